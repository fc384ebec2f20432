"""Readers: what users have as data becomes examples. One file for each kind of data, known by name in `READERS`."""

from .base import DEFAULT as DEFAULT
from .base import FIELDS as FIELDS
from .base import READERS as READERS
from .base import Reader as Reader
from .base import Source as Source
from .base import columns_of as columns_of
from .rows import Row as Row
