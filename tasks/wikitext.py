"""WikiText-2's test split as one text: how much likelihood of general text does tuning cost?

Rows come from a local folder (test.jsonl[.gz] with `text`) or from the hub's `Salesforce/wikitext`.
A blank line of the raw file is an empty row there. Joining the rows gives wiki.test.raw byte for
byte, with its ` @-@ ` and its blanks around commas. This is not a task with questions and answers:
analysis/likelihood.py measures the loss on `windows`, analysis/preserve.py compares models by it.
"""
import torch

from tasks.common import load_rows, rows_name


def load_text(split: str = "test", data_dir: str = "") -> str:
    """Return the whole text. Raises ValueError or FileNotFoundError in one sentence."""
    rows = load_rows(split, data_dir, "Salesforce/wikitext", "wikitext-2-raw-v1")
    name = rows_name(split, data_dir, "Salesforce/wikitext")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"{name}, row {number}: 'text' must be a text")
    return "".join(row["text"] or " \n" for row in rows)


def windows(text: str, tok, length: int = 512, limit: int = 0):
    """Cut a text into consecutive windows of `length` tokens, each after BOS if any -> (N, T) ids.

    The last, partial window is dropped. limit: how many windows to take, spread evenly over the
    text; 0 takes all. The default length is our choice. Raises ValueError for a shorter text.
    """
    ids = tok.encode(text)
    n = len(ids) // length if length > 0 else 0
    if not n:
        raise ValueError(f"a text of {len(ids)} tokens has no window of {length}")
    whole = torch.tensor(ids[:n * length]).view(n, length)
    whole = torch.cat([torch.tensor(tok.bos, dtype=torch.long).expand(n, -1), whole], dim=1)
    return whole[[i * n // limit for i in range(limit)]] if 0 < limit < n else whole
