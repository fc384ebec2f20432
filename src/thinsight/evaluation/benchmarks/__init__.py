"""Benchmarks by name: what is asked, how an answer is scored, and what the literature reports of all scores."""

from .base import BENCHMARKS as BENCHMARKS
from .base import Benchmark as Benchmark
from .base import benchmark_of as benchmark_of
from .base import headlines as headlines
from .base import longest_answer as longest_answer
from .base import measured as measured
from .base import taken as taken
from .measures import Measure as Measure
from .measures import Measured as Measured
