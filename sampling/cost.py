"""The cost of generating: forward passes, tokens and seconds."""
from dataclasses import dataclass


@dataclass
class Cost:
    """Adds up over calls. Only generated tokens count: a prompt is read, not generated."""
    passes: int = 0
    row_passes: int = 0                 # one pass over a batch of 8 rows is 8 of these
    tokens: int = 0                     # of each row, up to its first end token, included
    seconds: float = 0.0

    def add_pass(self, n_rows: int):
        self.passes += 1
        self.row_passes += n_rows

    def numbers(self) -> dict:
        return {
            "passes": self.passes,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 2),
            "tokens_per_pass": round(self.tokens / max(1, self.row_passes), 3),
            "tokens_per_second": round(self.tokens / max(1e-9, self.seconds), 1),
        }

    def line(self) -> str:
        found = self.numbers()
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        return (f"{passes}, {found['tokens_per_pass']} tokens per pass, "
                f"{found['tokens_per_second']} tokens/s up to the end")
