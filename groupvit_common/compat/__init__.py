"""Habits of transformers' classes that programs rely on and our own code does not: a file per class that has them.

The classes of `model` and `preprocessing` derive from what is here; nothing here imports them.
"""
