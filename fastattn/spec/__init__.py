"""What a call of each op *is*: validated and canonical, once.

Each module holds a ``NamedTuple`` whose fields are, in order, the arguments of the dispatcher op of the same name,
and the function that builds it from what the user passed.  Everything below this floor may rely on it; nothing below
it validates again.
"""
