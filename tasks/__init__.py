"""Text in, score out.

A task is a module with load(split) -> list[Example] and score(completion, example).
"""
