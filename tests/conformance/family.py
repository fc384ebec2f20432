"""What an entry of the table of families is: how to build its model, and what its inputs look like.

Models are stock transformers classes with random weights drawn wide enough that attention is far from flat,
so that rankings do not hang on rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from thinsight.checking.prompts import IMAGES as IMAGES
from thinsight.checking.prompts import MIXED as MIXED
from thinsight.checking.prompts import PADDED as PADDED
from thinsight.checking.prompts import VIDEOS as VIDEOS
from thinsight.checking.prompts import Prompts
from thinsight.checking.prompts import Vision as Vision
from thinsight.checking.reference import keys_of

from .inputs import BOS, EOS, FIRST_WORD, PAD, VOCABULARY, Batch, Collate, Row, Spec, TokenTypes, flat


@dataclass(frozen=True, eq=False)
class Family:
    """One model family. Only `name`, `model_class`, `config` and `image` are needed."""

    name: str
    model_class: str  # of transformers
    config: Mapping[str, Any]  # keyword arguments of its config class
    image: Vision
    video: Vision | None = None
    mixes_video: bool = True  # images and videos can stand in one batch
    types: TokenTypes | None = None
    collate: Collate = flat
    attn: tuple[str, ...] = ("sdpa", "eager", "flex_attention")  # implementations that the stock model has
    beams: tuple[Spec, ...] = PADDED  # rows on which the stock model's beam search is right
    encodes_ahead: bool = True  # `generate` can copy and cut what the stock model's encoder made
    images_later: bool = True  # the stock model reads the image of a later turn as it would from the start
    in_space: bool = False  # tokens have places in space, or more features, of which embeddings say nothing
    assisted: bool = True  # the stock model runs with an assistant
    static_cache: bool = True  # the stock model runs with one
    absolute: bool = False  # layers read positions as such, which a plain forward counts over padding
    stacked: bool = False  # features also enter between decoder layers, of which embeddings say nothing
    ends_in_images: bool = True  # the stock `generate` knows the positions behind a prompt that ends in an image
    places_later_images: bool = True  # the stock `generate` knows the positions of images behind a cache
    takes_processors: bool = True  # the stock `generate` heeds a `logits_processor`
    config_class: str = ""  # of transformers, where several share the model class
    core: bool = False  # also runs where the whole suite does not
    refuses: Mapping[str, str] = field(default_factory=dict)  # behaviour -> regular expression of the message

    @property
    def available(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, self.model_class)

    @property
    def model_type(self) -> str:
        """`config.model_type`."""
        return str(self._config_class.model_type)

    @property
    def _config_class(self) -> Any:
        return getattr(transformers, self.config_class or getattr(transformers, self.model_class).config_class.__name__)

    @property
    def stateful(self) -> bool:
        """Whether the stock model has states that cannot be put back, and so neither an assistant nor a crop."""
        return bool(getattr(getattr(transformers, self.model_class), "_is_stateful", False))

    @property
    def layer_types(self) -> list[str]:
        """ "sliding_attention", "full_attention" or what carries a state of each decoder layer."""
        text = self.model().config.get_text_config()
        kind = "full_attention" if getattr(text, "sliding_window", None) is None else "sliding_attention"
        return getattr(text, "layer_types", None) or [kind] * text.num_hidden_layers

    @property
    def keys_of(self) -> dict[int, int]:
        """The decoder layers without keys of their own, and the layer whose keys each reads."""
        return keys_of(self.model().config.get_text_config(), 4)

    def build(self, attn: str | None = None, seed: int = 0, layers: int = 4) -> PreTrainedModel:
        """A new model, float32, in eval mode, for a test that changes it; sdpa if the family has it."""
        attn = attn or self.attn[0]
        model_class = getattr(transformers, self.model_class)
        settings = copy.deepcopy(dict(self.config))
        settings["text_config"]["num_hidden_layers"] = layers
        model = model_class._from_config(self._config_class(**settings), attn_implementation=attn)
        draw_weights(model, seed)
        for name, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
            setattr(model.generation_config, name, token)
        # a random model would write image tokens, which a later pass reads as an image
        model.generation_config.suppress_tokens = [i for i in range(FIRST_WORD) if i != EOS]
        return model.eval()

    def model(self, attn: str | None = None, seed: int = 0) -> PreTrainedModel:
        """The same model every time, for tests that leave it as it was."""
        return _shared(self, attn or self.attn[0], seed)

    @property
    def prompts(self) -> Prompts:
        """What its prompts look like, each opened by a BOS token."""
        return Prompts(
            image=self.image,
            video=self.video,
            mixes_video=self.mixes_video,
            types=self.types,
            collate=self.collate,
            vocabulary=range(FIRST_WORD, VOCABULARY),
            start=(BOS,),
            pad=PAD,
        )

    def rows(self, specs: Sequence[Spec], seed: int = 0) -> list[Row]:
        """As `Prompts.rows`."""
        return self.prompts.rows(specs, seed)

    def later_turn(self, spec: Spec, seed: int = 1) -> Row:
        """As `Prompts.later_turn`."""
        return self.prompts.later_turn(spec, seed)

    def batch(self, rows: list[Row], padding: str = "left") -> Batch:
        """Rows put together."""
        return self.prompts.batch(rows, padding)

    def inputs(self, specs: Sequence[Spec] = IMAGES, *, seed: int = 0, padding: str = "left") -> dict[str, Tensor]:
        """Keyword arguments of `forward` and `generate` for a padded batch of prompts."""
        return self.batch(self.rows(specs, seed), padding).inputs

    def placed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs, for a plain forward that gives each token the position that `generate` gives it."""
        if not self.absolute:
            return inputs
        return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}

    def later_inputs(self, model: PreTrainedModel, wholes: list[Row], turns: list[Row]) -> dict[str, Any]:
        """As `Prompts.later_inputs`."""
        return self.prompts.later_inputs(model, wholes, turns)


def decoder_of(model: PreTrainedModel) -> Any:
    """The text model; Llama 4 hands it out together with its head."""
    text: Any = model.get_decoder()
    return text if hasattr(text, "layers") else text.model


@cache
def _shared(family: Family, attn: str, seed: int) -> PreTrainedModel:
    return family.build(attn, seed)


_TOKENS = ("embed", "newline", "separator", "image_begin", "image_end")  # in names of what stands among tokens


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw every weight anew, in the order of its name."""
    draw = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()
    for name, parameter in sorted(model.named_parameters()):
        if id(parameter) in drawn:
            continue
        drawn.add(id(parameter))
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim == 2 and "embed" not in name:
            parameter.copy_(1.5 * parameter.shape[1] ** -0.5 * noise)
        elif parameter.ndim == 3 and "experts" in name:
            parameter.copy_(1.5 * parameter.shape[2] ** -0.5 * noise)
        elif parameter.ndim >= 4:
            parameter.copy_(parameter[0].numel() ** -0.5 * noise)
        elif parameter.ndim >= 2 or any(word in name for word in _TOKENS):
            parameter.copy_(noise)
        elif "q_norm" in name or "k_norm" in name:
            parameter.add_(0.6 + 0.1 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif name.endswith("A_log"):
            parameter.copy_(0.5 * noise - 1)  # states that outlast a prompt
