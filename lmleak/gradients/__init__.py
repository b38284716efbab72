"""Which gradients leave the machine, and what they are."""

from lmleak.gradients.select import modules_table, select

__all__ = ["modules_table", "select"]
