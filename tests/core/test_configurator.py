"""Laws of the settings: who wins, what fits, and that a mistake is said and never executed."""

import ast
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import torch

import configurator
from configurator import HOW_TO_RUN, configure, run, sentence
from helpers import sentence as sentence_of
from test_docs import all_settings
from train import TrainConfig

REPO = Path(configurator.__file__).parent


@dataclasses.dataclass
class Settings:
    """A class with one setting of every kind; # this is no comment."""

    lr: float = 3e-4  # peak learning rate
    max_steps: int = 300  # length: turns of the loop
    compile: bool = False  # whether torch compiles the model
    data: str = "a#b: c"  # name of the task, #1 by default
    schedule: Literal["cosine", "constant"] = "cosine"  # shape of the decay
    betas: tuple[float, ...] = (0.9, 0.95)  # memory of Adam
    layers: tuple[int, ...] = (1, 2)  # which layers are probed
    tasks: tuple[str, ...] = ("gsm8k",)  # what is evaluated
    resume: Literal[False, True, "auto"] = False  # whether to go on

    def __post_init__(self):
        if self.max_steps < 0:
            raise ValueError(f"max_steps={self.max_steps} must not be negative")


@dataclasses.dataclass
class Other:
    depth: int = 3  # how deep


@dataclasses.dataclass
class Child(Other, Settings):
    own: tuple[int, ...] = (1,
                            2, 3)  # what only the child has
    lr: float = 1.0


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A function that writes config/name.py into an empty current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()

    def write(name, text):
        (tmp_path / "config" / name).write_text(text)
        return f"config/{name}"

    return write


def mistake(argv, cls=Settings, kind=ValueError):
    """The one sentence that these arguments stop with."""
    with pytest.raises(kind) as caught:
        configure(cls, argv)
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def help_of(argv, capsys, cls=Settings, default=None):
    """The text that these arguments print before they end the program with exit code 0."""
    with pytest.raises(SystemExit) as caught:
        configure(cls, argv, default)
    assert not caught.value.code  # 0, or None which means 0
    return capsys.readouterr().out


# ---- who wins ----


def test_no_arguments_give_the_defaults_of_the_class():
    assert configure(Settings, []) == Settings()


def test_defaults_yield_to_the_first_file_then_the_second_then_the_command_line(config):
    first = config("first.py", "lr = 0.1\nmax_steps = 1\ndata = 'first'")
    second = config("second.py", "lr = 0.2\nmax_steps = 2")
    cfg = configure(Settings, [first, "--lr=0.3", second])  # an option wins wherever it stands
    assert cfg == Settings(lr=0.3, max_steps=2, data="first")


def test_of_two_equal_options_the_last_one_counts():
    assert configure(Settings, ["--lr=1", "--lr=2"]).lr == 2


def test_default_file_is_for_the_bare_command(config):
    default = config("default.py", "lr = 0.1\nmax_steps = 1")
    other = config("other.py", "lr = 0.2")
    assert configure(Settings, [], default) == Settings(lr=0.1, max_steps=1)
    assert configure(Settings, ["--max_steps=2"], default) == Settings(max_steps=2)
    assert configure(Settings, [other], default) == Settings(lr=0.2)
    assert configure(Settings, [other], default="config/missing.py") == Settings(lr=0.2)


def test_argv_is_the_command_line_unless_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr=0.5"])
    assert configure(Settings).lr == 0.5
    assert configure(Settings, []).lr == Settings.lr


def test_path_is_sought_in_the_current_directory_then_beside_the_configurator(tmp_path):
    repo, elsewhere = tmp_path / "repo", tmp_path / "elsewhere"
    write_script(repo)
    (repo / "config").mkdir()
    (elsewhere / "config").mkdir(parents=True)
    (repo / "config" / "x.py").write_text("lr = 1.0")
    assert run_script(repo, "config/x.py", cwd=elsewhere).stdout == "lr is 1.0\n"
    (elsewhere / "config" / "x.py").write_text("lr = 2.0")
    assert run_script(repo, "config/x.py", cwd=elsewhere).stdout == "lr is 2.0\n"


# ---- what fits ----


@pytest.mark.parametrize(
    "option, value",
    [
        ("--lr=1e-5", 1e-5),
        ("--lr=3", 3.0),
        ("--lr=-0.5", -0.5),
        ("--max_steps=300", 300),
        ("--max_steps=1_000", 1000),
        ("--compile", True),
        ("--compile=True", True),
        ("--compile=true", True),
        ("--compile=1", True),
        ("--compile=False", False),
        ("--compile=false", False),
        ("--compile=0", False),
        ("--resume", True),
        ("--resume=True", True),
        ("--resume=1", True),
        ("--resume=false", False),
        ("--resume=auto", "auto"),
        ("--data=300", "300"),
        ("--data=a=b c", "a=b c"),
        ("--data=", ""),
        ("--schedule=constant", "constant"),
        ("--betas=0.2,0.5", (0.2, 0.5)),
        ("--betas=(0.2, 0.5)", (0.2, 0.5)),
        ("--betas=1", (1.0,)),
        ("--betas=(1,)", (1.0,)),
        ("--betas=()", ()),
        ("--layers=3,4", (3, 4)),
        ("--tasks=gsm8k,mmlu", ("gsm8k", "mmlu")),
        ("--tasks=('gsm8k', 'mmlu')", ("gsm8k", "mmlu")),
    ],
)
def test_option_is_parsed_as_the_kind_of_its_field(option, value):
    name = option[2:].partition("=")[0]
    before = [f"--compile={not value}", f"--resume={not value}"]    # so that flags change something
    parsed = getattr(configure(Settings, [*before, option]), name)
    assert parsed == value and type(parsed) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, parsed)) == list(map(type, value))


@pytest.mark.parametrize(
    "line, value",
    [
        ("lr = -3", -3.0),
        ("lr = 1e-5", 1e-5),
        ("max_steps = 1_000", 1000),
        ("compile = True", True),
        ("data = '300'", "300"),
        ("schedule = 'constant'", "constant"),
        ("resume = True", True),
        ("resume = 'auto'", "auto"),
        ("betas = (0.2, -1)", (0.2, -1.0)),
        ("betas = [1, 0.5]", (1.0, 0.5)),
        ("layers = []", ()),
        ("tasks = ('gsm8k', 'mmlu')", ("gsm8k", "mmlu")),
    ],
)
def test_line_of_a_file_is_the_literal_it_shows(config, line, value):
    path = config("x.py", f'"""What\nyou get."""\n\n# a comment\n{line}  # and another\n')
    parsed = getattr(configure(Settings, [path]), line.split()[0])
    assert parsed == value and type(parsed) is type(value)
    if isinstance(value, tuple):
        assert list(map(type, parsed)) == list(map(type, value))


def test_hints_may_be_strings():
    cls = dataclasses.make_dataclass("Lazy", [("lr", "float", 0.1), ("n", "int", 1)])
    assert configure(cls, ["--lr=3", "--n=2"]) == cls(3.0, 2)


# ---- what does not fit ----


@pytest.mark.parametrize(
    "option, words",
    [
        ("--lr=abc", "lr='abc' on the command line is not a finite float, e.g. --lr=0.0003"),
        ("--lr=", "lr='' on the command line is not a finite float, e.g. --lr=0.0003"),
        ("--max_steps=3.5", "max_steps='3.5' on the command line is not an int, e.g. --max_steps="),
        ("--max_steps=True", "max_steps='True' on the command line is not an int"),
        ("--compile=yes", "compile='yes' on the command line is not a bool, e.g. --compile=False"),
        ("--compile=2", "compile='2' on the command line is not a bool"),
        ("--resume=yes", "resume='yes' on the command line is not one of False, True, auto, e.g."),
        ("--resume=Auto", "resume='Auto' on the command line is not one of False, True, auto"),
        ("--resume=", "resume='' on the command line is not one of False, True, auto"),
        ("--schedule=cos", "schedule='cos' on the command line is not one of cosine, constant"),
        ("--betas=0.2;0.5", "betas='0.2;0.5' on the command line is not a tuple[float, ...]"),
        ("--betas=0.2,,0.5", "betas='0.2,,0.5' on the command line is not a tuple[float, ...]"),
        ("--layers=1.5,2", "layers='1.5,2' on the command line is not a tuple[int, ...]"),
    ],
)
def test_option_of_the_wrong_kind_says_what_would_fit(option, words):
    assert words in mistake([option])


@pytest.mark.parametrize(
    "line, words",
    [
        ("lr = 'abc'", "lr='abc' in config/x.py line 2 is not a finite float, e.g. lr = 0.0003"),
        ("lr = '0.1'", "lr='0.1' in config/x.py line 2 is not a finite float"),
        ("lr = True", "lr=True in config/x.py line 2 is not a finite float"),
        ("lr = None", "lr=None in config/x.py line 2 is not a finite float"),
        ("lr = 1" + 400 * "0", "in config/x.py line 2 is not a finite float"),
        ("max_steps = True", "max_steps=True in config/x.py line 2 is not an int"),
        ("max_steps = 3.0", "max_steps=3.0 in config/x.py line 2 is not an int"),
        ("compile = 1", "compile=1 in config/x.py line 2 is not a bool"),
        ("data = 3", "data=3 in config/x.py line 2 is not a string, e.g. data = 'a#b: c'"),
        ("resume = 1", "resume=1 in config/x.py line 2 is not one of False, True, auto"),
        ("resume = 'True'", "resume='True' in config/x.py line 2 is not one of False, True, auto"),
        ("schedule = 'cos'", "schedule='cos' in config/x.py line 2 is not one of cosine, constant"),
        ("betas = 0.9", "betas=0.9 in config/x.py line 2 is not a tuple[float, ...]"),
        ("betas = (1, True)", "betas=(1, True) in config/x.py line 2 is not a tuple[float, ...]"),
        ("layers = (1, 2.0)", "layers=(1, 2.0) in config/x.py line 2 is not a tuple[int, ...]"),
        ("tasks = ('gsm8k')", "tasks='gsm8k' in config/x.py line 2 is not a tuple[str, ...]"),
    ],
)
def test_literal_of_the_wrong_kind_names_file_and_line(config, line, words):
    assert words in mistake([config("x.py", f"# a comment\n{line}\n")])


def test_proposed_example_is_accepted():
    for option in ("--lr=x", "--max_steps=x", "--compile=x", "--schedule=x", "--betas=x"):
        proposed = shlex.split(mistake([option]).partition("e.g. ")[2])
        assert configure(Settings, proposed) == Settings()


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--max-steps=3"], "unknown setting 'max-steps' on the command line "
                            "(did you mean 'max_steps'?)"),
        (["--compil"], "unknown setting 'compil' on the command line (did you mean 'compile'?)"),
        (["--LR=3"], "unknown setting 'LR' on the command line (did you mean 'lr'?)"),
        (["--zzz=3"], "unknown setting 'zzz' on the command line (--help lists them all)"),
        (["lr=3"], "'lr=3' on the command line needs two dashes: --lr=3"),
        (["-lr=3"], "'-lr=3' on the command line needs two dashes: --lr=3"),
        (["--lr"], "--lr on the command line needs a value: --lr=value, without a space"),
        (["--schedule"], "--schedule on the command line needs a value: --schedule=value, without "
                         "a space"),
        (["--lr", "3"], "--lr on the command line needs a value: --lr=value, without a space"),
        (["missing.py", "--lr", "3"],
         "--lr on the command line needs a value: --lr=value, without a space"),
        (["--max_steps=-1"], "max_steps=-1 must not be negative"),  # the class's own sentence
    ],
)
def test_mistake_on_the_command_line_is_one_sentence_that_says_what_would_fit(argv, sentence):
    assert mistake(argv) == sentence


def test_unknown_setting_of_a_file_names_its_line_and_the_nearest_name(config):
    path = config("x.py", "lrr = 0.1")
    assert mistake([path]) == "unknown setting 'lrr' in config/x.py line 1 (did you mean 'lr'?)"


# what other projects call a setting: our name for it; empty: there is none
FOREIGN = dict(pair.split("=") for pair in """
    learning_rate=lr max_lr=lr max_iters=max_steps num_train_epochs=epochs n_epochs=epochs
    output_dir=out_dir model_name_or_path=init_from per_device_train_batch_size=micro_batch_size
    max_seq_length=max_length max_seq_len=max_length max_new_tokens=gen_length optim=optimizer
    warmup_steps=warmup_ratio warmup_iters=warmup_ratio eval_interval=eval_every depth=depths
    eval_steps=eval_every save_steps=save_every logging_steps=log_every log_interval=log_every
    report_to=track wandb_log=track lora_r=lora_rank lora_target_modules=lora_targets tasks=task
    num_hidden_layers=n_layer n_layers=n_layer num_layers=n_layer num_attention_heads=n_head
    n_heads=n_head num_key_value_heads=n_kv_head hidden_size=n_embd d_model=n_embd embed_dim=n_embd
    intermediate_size=n_hidden n_ctx=block_size max_position_embeddings=block_size model=models
    max_grad_norm=grad_clip gradient_clip_val=grad_clip epoch=epochs remask=remasking devices=device
    gradient_checkpointing=checkpoint_activations temperature=temperature num_fewshot=n_shot
    jepa_rate= steps=steps seq_len= mlp_ratio=
    beta1= adam_beta1= adam_epsilon= bias= dropout= lora_dropout= backend= decay_lr= lr_decay_iters=
    dataset= dataset_name= vocab_size= mask_ratio= mask_id= momentum= teacher_decay=ema_decay
    time_epsilon= num_workers= local_rank= world_size= precision= fp16= bf16= run_name=
    """.split())


def slips(name):
    """Yield what a slip makes of a name: a letter is dropped, doubled, or changes places."""
    for i in range(len(name)):
        yield name[:i] + name[i + 1:]
        yield name[:i + 1] + name[i:]
        yield name[:i] + name[i:i + 2][::-1] + name[i + 2:]


def hint_of(name, cls) -> str:
    """Return the setting that the sentence about an unknown one proposes; empty: none."""
    said = sentence_of(configurator.check, name, "1", cls, configurator.COMMAND_LINE)
    return "".join(re.findall(r"did you mean '(\w+)'", said))


@pytest.mark.parametrize("script, cls", all_settings().items())
def test_a_slip_is_answered_with_the_setting_that_was_meant(script, cls):
    """Or with its neighbour: top_ may be top_k or top_p, and a slip in seeds may look like seed."""
    names, found = get_type_hints(cls), []
    for name in names:
        near = {name} | {other for other in names if set(slips(other)) & {name, *slips(name)}}
        found += [hint_of(slip, cls) for slip in set(slips(name)) - names.keys() - {""}]
        assert set(found) <= {"", *near}, name
        found = [""] * found.count("")
    assert len(found) < 3 * len(names)      # of about 60 slips of each


@pytest.mark.parametrize("script, cls", all_settings().items())
def test_a_name_of_another_project_is_answered_with_that_concept_or_none(script, cls):
    for name in FOREIGN.keys() - get_type_hints(cls):
        assert hint_of(name, cls) in ("", FOREIGN[name]), name


@pytest.mark.parametrize("name, hint", configurator.ELSEWHERE.items())
def test_the_common_names_of_other_projects_are_known(name, hint):
    owners = [cls for cls in all_settings().values() if hint in get_type_hints(cls)]
    assert owners and all(hint_of(name, cls) == hint for cls in owners)


def test_unknown_file_lists_those_that_exist(config, monkeypatch, tmp_path):
    monkeypatch.setattr(configurator, "BASES", (Path(), tmp_path / "repo"))
    config("one.py", "")
    (tmp_path / "repo" / "config").mkdir(parents=True)
    (tmp_path / "repo" / "config" / "two.py").write_text("")
    (tmp_path / "train.py").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "three.py").write_text("")
    for path in ("config/on.py", "on.py", "confg/one.py", "config"):
        sentence = mistake([path], kind=FileNotFoundError)
        assert sentence == f"no config file {path}, there are config/one.py, config/two.py"
    assert "old/three.py" in mistake(["old/one.py"], kind=FileNotFoundError)


def test_unknown_file_where_there_are_none_says_so(config, monkeypatch):
    monkeypatch.setattr(configurator, "BASES", (Path(),))
    assert mistake(["x.py"], kind=FileNotFoundError) == "no config file x.py, there are none"


def test_value_that_only_the_class_can_judge_keeps_its_own_sentence(config):
    assert mistake([config("x.py", "max_steps = -1")]) == "max_steps=-1 must not be negative"


# ---- files are read, not executed ----


@pytest.mark.parametrize(
    "line",
    [
        "data = __import__('os').system('touch executed')",
        "__import__('os').system('touch executed')",
        "data = open('executed', 'w').name",
        "data = [open(name, 'w') for name in ['executed']]",
        "data = f\"{open('executed', 'w')}\"",
        "@(lambda f: open('executed', 'w'))\ndef data(): pass",
        "class data: open('executed', 'w')",
        "if open('executed', 'w'): data = 'x'",
        "import os",
        "max_steps = 2 * 300",
        "max_steps = max_steps",
        "max_steps += 1",
        "max_steps: int = 3",
        "max_steps = layers = 3",
        "max_steps, lr = 3, 0.1",
        "max_steps.real = 3",
        "del max_steps",
        "data = {[]: 1}",
        "'a second docstring'",
    ],
)
def test_all_but_name_equals_literal_stops_and_is_not_executed(config, tmp_path, line):
    path = config("x.py", f'"""What you get."""\nlr = 0.1\n{line}\n')
    sentence = mistake([path])
    # A decorated function counts from its `def`, one line further down.
    where = "line 4" if line.startswith("@") else "line 3"
    assert f"in config/x.py {where} is not `name = literal`" in sentence
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("line", ["lr = (", "max steps = 3", "  lr = 3", "lr = 3e", "lr = 'x"])
def test_syntax_error_names_file_and_line(config, line):
    sentence = mistake([config("x.py", f"# a comment\n{line}\n")])
    assert sentence.startswith("syntax error in config/x.py line 2: ")


def test_file_that_is_no_text_is_named(config, tmp_path):
    for content in (b"\x80\x02}q\x00.", b"PK\x03\x04\x00\x00", b"data = '\xff'"):
        (tmp_path / "ckpt.pt").write_bytes(content)
        assert "ckpt.pt" in mistake(["ckpt.pt"])


# ---- help ----


def test_help_shows_the_script_and_every_setting_with_default_kind_and_comment(capsys):
    text = help_of(["--help"], capsys)
    assert text.startswith(__doc__.strip())
    assert "usage: python " in text and "--key=value" in text
    lines = {line.split("=")[0].strip(): line for line in text.splitlines() if "--" in line[:4]}
    expected = {
        "--lr": ("--lr=0.0003 ", "float", "  peak learning rate ("),
        "--max_steps": ("--max_steps=300 ", "int", "  length: turns of the loop ("),
        "--compile": ("--compile=False ", "bool", "  whether torch compiles the model ("),
        "--data": ("--data='a#b: c' ", "string", "  name of the task, #1 by default ("),
        "--schedule": ("--schedule=cosine ", "cosine, constant", "  shape of the decay ("),
        "--betas": ("--betas=0.9,0.95 ", "tuple[float, ...]", "  memory of Adam ("),
        "--layers": ("--layers=1,2 ", "tuple[int, ...]", "  which layers are probed ("),
        "--tasks": ("--tasks=gsm8k ", "tuple[str, ...]", "  what is evaluated ("),
        "--resume": ("--resume=False ", "one of False, True, auto", "  whether to go on ("),
    }
    assert list(lines) == list(expected)  # all of them, in the order of the class
    for name, parts in expected.items():
        assert all(part in lines[name] for part in parts), lines[name]


def test_help_shows_the_values_of_the_files_beside_it(config, capsys):
    path, default = config("x.py", "lr = 0.125"), config("default.py", "max_steps = 7")
    assert "--lr=0.125 " in help_of([path, "-h"], capsys)
    assert "--lr=0.125 " in help_of(["--help", path], capsys)
    assert "--max_steps=300 " in help_of(["--help"], capsys, default=default)  # as with any option
    assert "--max_steps=300 " in help_of(["--help", path], capsys, default=default)


def test_what_help_shows_can_be_typed(config, capsys):
    path = config("x.py", "betas = (1, 2.5)\ndata = 'is \"#1\"; $HOME'\nlayers = ()\n"
                  "tasks = ['a', 'b c']\n")
    lines = help_of(["--help", path], capsys).splitlines()
    typed = [shlex.split(line)[0] for line in lines if line.startswith("  --")]
    assert configure(Settings, typed) == configure(Settings, [path])


def test_help_quotes_only_what_a_shell_would_misread(config, capsys):
    path = config("x.py", "data = ''\ntasks = ('q_proj', 'k_proj')\nlayers = ()")
    text = help_of(["--help", path], capsys)
    assert "--tasks=q_proj,k_proj " in text and "--data= " in text and "--layers= " in text
    assert "--data='a b' " in help_of(["--help", config("y.py", "data = 'a b'")], capsys)


def test_help_shows_the_settings_of_the_class_itself_before_those_it_inherits(capsys):
    lines = help_of(["--help"], capsys, cls=Child).splitlines()
    shown = [line.split("=")[0].strip(" -") for line in lines if line.startswith("  --")]
    inherited = [field.name for field in dataclasses.fields(Settings) if field.name != "lr"]
    assert shown == ["own", "lr", "depth", *inherited]
    text = "\n".join(lines)
    assert "  what only the child has (" in text and "  how deep (" in text
    assert "--lr=1.0 " in text and "  peak learning rate (" in text  # the default is the child's
    assert configure(Child, ["--own=2,3", "--depth=4"]) == Child(own=(2, 3), depth=4)


def test_help_reads_the_comment_of_a_value_that_takes_several_lines(capsys):
    text = help_of(["--help"], capsys, cls=Child)
    assert "--depth=3 " in text and "--own=1,2,3 " in text
    assert "what only the child has (a tuple[int, ...])" in text


def test_help_beside_a_mistake_is_still_help(capsys):
    assert "peak learning rate" in help_of(["--lrr=3", "--lr", "-h"], capsys)


def test_help_of_a_class_without_source_has_no_comments(capsys):
    namespace = {"__name__": __name__, "dataclass": dataclasses.dataclass}
    exec("@dataclass\nclass Sourceless:\n    lr: float = 0.25  # unseen", namespace)
    text = help_of(["--help"], capsys, cls=namespace["Sourceless"])
    assert "--lr=0.25 " in text and "float" in text and "unseen" not in text


def test_help_of_a_class_inside_a_function_has_its_comments(capsys):
    @dataclasses.dataclass
    class Inner:
        lr: float = 0.25  # seen from inside
        n: int = 1

    text = help_of(["--help"], capsys, cls=Inner)
    assert "seen from inside" in text and "--n=1 " in text


# ---- run ----


SCRIPT = '''
"""A script."""
from dataclasses import dataclass
from configurator import run

@dataclass
class Config:
    lr: float = 0.1  # peak learning rate

def main(cfg):
    if cfg.lr < 0:
        raise ValueError("lr must not be negative")
    if cfg.lr > 100:
        open("missing.txt")
    if cfg.lr > 10:
        raise RuntimeError("a bug")
    print("lr is", cfg.lr)

if __name__ == "__main__":
    run(main, Config)
'''


def write_script(folder):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT.lstrip())
    shutil.copy(configurator.__file__, folder)


def run_script(folder, *argv, cwd=None):
    command = [sys.executable, str(folder / "script.py"), *argv]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd or folder, env=env, capture_output=True, text=True)


def test_run_calls_main_with_the_settings(tmp_path):
    write_script(tmp_path)
    done = run_script(tmp_path, "--lr=0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "lr is 0.5\n", "")


@pytest.mark.parametrize(
    "arg, words",
    [
        ("--lrr=3", "unknown setting 'lrr' on the command line (did you mean 'lr'?)"),
        ("config/missing.py", "no config file config/missing.py"),
        ("--lr=-1", "lr must not be negative"),  # out of main
        ("--lr=101", "No such file or directory: 'missing.txt'"),  # out of main
    ],
)
def test_run_ends_a_mistake_with_one_line_and_exit_code_1(tmp_path, arg, words):
    write_script(tmp_path)
    done = run_script(tmp_path, arg)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_run_leaves_a_bug_its_traceback(tmp_path):
    write_script(tmp_path)
    done = run_script(tmp_path, "--lr=11")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: a bug" in done.stderr


@pytest.mark.parametrize("arg", ["--lr=0.5", "--help"])
def test_a_reader_that_has_gone_ends_the_script_without_a_word(tmp_path, arg):
    write_script(tmp_path)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, str(tmp_path / "script.py"), arg]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_help_of_a_script_is_its_docstring_with_exit_code_0(tmp_path):
    write_script(tmp_path)
    done = run_script(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("A script.\n\nusage: python ")
    assert "peak learning rate" in done.stdout


def test_nothing_happens_at_import():
    command = [sys.executable, "-c", "import configurator", "--help", "--lr=3"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- every script of the project ----


def scripts():
    """[(path from the repository, the name of its settings class)] of files that call `run`."""
    found = []
    for path in sorted([*REPO.glob("*.py"), *REPO.glob("*/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            is_run = isinstance(node, ast.Call) and ast.unparse(node.func) == "run"
            if is_run and len(node.args) > 1:
                if path.parent.name not in ("tests", "config"):
                    found.append((str(path.relative_to(REPO)), ast.unparse(node.args[1])))
    return found


def test_the_scripts_are_found():
    assert {"train.py", "sample.py", "eval_gsm8k.py", "pretrained/weights.py",
            "analysis/compare.py"} <= {path for path, _ in scripts()}


@pytest.mark.parametrize("path, name", scripts())
def test_help_has_a_text_for_every_setting(path, name, capsys):
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    cls = getattr(module, name)
    lines = [line for line in help_of(["--help"], capsys, cls).splitlines() if "  --" in line[:4]]
    assert len(lines) == len(dataclasses.fields(cls))
    without = [line.split("=")[0].strip() for line in lines if re.match(r"  --\S+ +\(", line)]
    assert not without, f"{path}: no comment beside {', '.join(without)}"


def imported(path):
    """The roots of what a script imports at its top level, in order."""
    for node in ast.parse((REPO / path).read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", sorted({path for path, _ in scripts()}))
def test_a_script_imports_configurator_before_torch(path):
    """And so before every other module of ours, for that may import torch."""
    ours = {path.stem for path in REPO.iterdir() if path.suffix in ("", ".py")}
    first = next(root for root in imported(path) if root in ours | {"torch", "safetensors"})
    assert first == "configurator"
    assert "OMP_WAIT_POLICY" not in (REPO / path).read_text()  # said once, in configurator


@pytest.mark.parametrize("given, expected", [({}, "PASSIVE 0"), (
    {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "7"}, "ACTIVE 7")])
def test_idle_threads_sleep_unless_the_environment_says_otherwise(given, expected):
    env = {key: value for key, value in os.environ.items()
           if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = ("import configurator, os, sys; assert 'torch' not in sys.modules\n"
            "print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env | given,
                          capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_the_default_config_stays_where_only_the_way_to_run_is_said(config):
    default = config("default.py", "lr = 0.1")
    assert configure(Settings, [], default).lr == 0.1
    for name in HOW_TO_RUN:
        cfg = configure(TrainConfig, [f"--{name}={'cpu' if name == 'device' else True}"],
                        "config/tiny.py")
        assert (cfg.out_dir, cfg.task, cfg.tokenizer) == ("out/tiny", "toy", "toy")


def test_overwrite_is_never_true_unless_the_user_said_so():
    assert not configure(TrainConfig, [], "config/tiny.py").overwrite
    bare = configure(TrainConfig, ["--init_from=x", "--task=gsm8k"], "config/tiny.py")
    assert bare == TrainConfig(init_from="x", task="gsm8k")
    assert configure(TrainConfig, ["--overwrite"], "config/tiny.py").overwrite


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999"])
def test_a_float_is_finite(config, text):
    with pytest.raises(ValueError, match="lr=.* is not a finite float"):
        configure(Settings, [f"--lr={text}"])
    if text == "1e999":
        with pytest.raises(ValueError, match="lr=inf in .* is not a finite float"):
            configure(Settings, [config("x.py", "lr = 1e999")])


@pytest.mark.parametrize("error, code", [
    (ValueError("x\x1b[2Jy"), r"x\x1b[2Jy"),
    (OSError(28, "No space left on device", "a/\x07b"),
     r"[Errno 28] No space left on device: 'a/\x07b'"),
    (RecursionError("deep"), "something in the input is nested too deeply"),
    (OverflowError("too large"), "a number in the input is too large: too large"),
    (MemoryError(), "out of memory: set a micro_batch_size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"),
     "out of memory: set a micro_batch_size"),
    (RuntimeError("MPS backend out of memory"), "out of memory: set a micro_batch_size"),
    (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"),
     "out of memory: set a micro_batch_size"),
    (RuntimeError("std::bad_alloc"), "out of memory: set a micro_batch_size"),
    (RuntimeError("Symlink loop from 'a'"), "Symlink loop from 'a'"),
    (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: set a micro_batch_size"),
    (KeyboardInterrupt(), 130),
])
def test_mistakes_and_limits_end_as_a_sentence(monkeypatch, error, code):
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def main(cfg):
        raise error
    with pytest.raises(SystemExit) as stop:
        run(main, Settings)
    assert stop.value.code == code or str(stop.value.code).startswith(f"{code} (0 is")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def main(cfg):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError):
        run(main, Settings)
    assert not sentence(KeyError("x"))


@pytest.mark.parametrize("text", ["x = " + "-" * 5000 + "1", "x = " + "+".join(["1"] * 60000),
                                  "lr = \0", "lr = " + "9" * 5000, "lr = " + "[" * 3000])
def test_a_config_that_python_cannot_read_is_named(config, text):
    with pytest.raises(ValueError, match="x.py"):
        configure(Settings, [config("x.py", text)])


def test_ctrl_c_while_torch_is_imported_has_no_traceback(tmp_path):
    """Sent when configurator has been read, which every script imports first."""
    script = tmp_path / "x.py"
    script.write_text("import configurator\nraise KeyboardInterrupt\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.returncode == -signal.SIGINT and done.stderr == ""
    script.write_text("import configurator\nraise KeyError('a bug')\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.returncode == 1 and "Traceback" in done.stderr
