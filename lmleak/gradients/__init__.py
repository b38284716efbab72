"""Which gradients leave the machine, and what they are."""

from lmleak.gradients.files import load as load_observation
from lmleak.gradients.files import save as save_observation
from lmleak.gradients.observe import grant, observe
from lmleak.gradients.select import modules_table, select

__all__ = ["grant", "load_observation", "modules_table", "observe", "save_observation", "select"]
