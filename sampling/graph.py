"""CUDA graphs: the kernels of a function are recorded once, and then launched by one call.

At 8 B a pass over one block launches some two thousand kernels, and the GPU seems to wait for the
host between them. A graph is launched as a whole. In return its kernels read and write the same
addresses each time: what changes is copied into the tensors that were there at the recording, and
nothing in between may depend on a number that the host would have to read.
"""
import functools

import torch

WARM_UPS = 3        # as many as torch.cuda.make_graphed_callables makes


def has_graphs(device) -> bool:
    return device.type == "cuda"


def check_graphs(device):
    """Raise ValueError unless the device has CUDA graphs."""
    if not has_graphs(device):
        raise ValueError(f"graphs=True needs a CUDA GPU, and the model is on device={device.type}; "
                         f"graphs=False fits there")


@functools.cache                # one for all graphs: libraries keep memory for every stream
def side_stream(device):
    return torch.cuda.Stream(device)


class Graph:
    """Calls a function of tensors as a CUDA graph, captured anew whenever their shapes change."""

    def __init__(self, device):
        self.device, self.inputs = device, []

    def __call__(self, function, *inputs):
        """Return what the function returns, a tensor; the next call overwrites it.

        The function is the same in all calls. Tensors that it reads besides its inputs must stay
        where they are. It may write to these in place, if a second call with the same inputs writes
        the same.
        """
        if [x.shape for x in inputs] != [x.shape for x in self.inputs]:
            self.capture(function, inputs)
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        self.graph.replay()
        return self.output

    def capture(self, function, inputs):
        """Record the function on a side stream, after calls that set up libraries and kernels; this
        synchronises."""
        self.graph = self.output = None         # an earlier graph gives its memory back first
        self.inputs, inputs = [], [x.clone() for x in inputs]
        with torch.cuda.device(self.device):
            side, here = side_stream(self.device), torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function(*inputs)
            here.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self.output = function(*inputs)
        self.inputs = inputs
