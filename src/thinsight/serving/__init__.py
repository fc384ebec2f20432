"""An OpenAI-compatible server of a transformers model under a reduction, for models that vLLM does not run.

Not built on `transformers serve`, whose classes are private and have other arguments in every release, which opens
any file and address that a request names, loads and unloads models for whoever asks, and knows no limits.
"""

from .run import Service, open_service
