"""Which gradients leave the machine, and what they are."""

from lmleak.gradients.observe import grant, observe
from lmleak.gradients.select import modules_table, select

__all__ = ["grant", "modules_table", "observe", "select"]
