"""Tasks: text in, score out. What a task is stands in tasks/common.py."""
