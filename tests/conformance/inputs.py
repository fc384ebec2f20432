"""The tokens of the suite's small models, and prompts of them; their parts are `thinsight.checking.prompts`'s.

Knows nothing about models, schedules or how a prompt is run.
"""

from __future__ import annotations

from functools import partial

from thinsight.checking import prompts
from thinsight.checking.prompts import IS_ANSWER as IS_ANSWER
from thinsight.checking.prompts import IS_IMAGE as IS_IMAGE
from thinsight.checking.prompts import IS_TEXT as IS_TEXT
from thinsight.checking.prompts import IS_VIDEO as IS_VIDEO
from thinsight.checking.prompts import Batch as Batch
from thinsight.checking.prompts import Collate as Collate
from thinsight.checking.prompts import Draw as Draw
from thinsight.checking.prompts import Part as Part
from thinsight.checking.prompts import Row as Row
from thinsight.checking.prompts import Spec as Spec
from thinsight.checking.prompts import TokenTypes as TokenTypes
from thinsight.checking.prompts import answer as answer
from thinsight.checking.prompts import collate as collate
from thinsight.checking.prompts import flat as flat
from thinsight.checking.prompts import per_row as per_row
from thinsight.checking.prompts import text as text

PAD, UNK, BOS, EOS, IMAGE, VIDEO, START, END, BREAK, TILE = range(10)
FIRST_WORD = 12
VOCABULARY = 96

vision = partial(prompts.vision, token=IMAGE)
