"""Prefills recorded once per shape and replayed: one launch in the place of thousands.

The model's own forward and `generate` run as ever, encoder and embeddings included; what is replayed is the
decoder, from its input to its last hidden state and its cache. Knows nothing about how a pass is reduced.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import BadInput, Unsupported
from ..ranking import autocasts
from ..runtime.anatomy import (
    attention_implementation,
    check_supported,
    decoder,
    model_device,
    sliding_layers,
    sorts_by_kind,
    state_layers,
    writes_vision_after,
)
from ..runtime.cache import CACHE, Kept, Thinned, cache_of, is_paged
from ..runtime.call import Plan
from ..runtime.handle import Handle, applied
from ..runtime.reducer import Pass
from ..runtime.tensors import causal

ATTENTION = ("sdpa", "eager")
T = TypeVar("T")

# what makes the host wait for the device: a number read, or a shape that depends on numbers
_READING = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero"),
        *("repeat_interleave", "unique_consecutive", "unique_dim"),
    )
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPYING = {"aten::_to_copy", "aten::copy_"}
_TENSORS = ("inputs_embeds", "position_ids", "attention_mask", CACHE)
_PLAIN = (bool, int, float, str)
_Result = tuple[Any, tuple[tuple[int, Tensor], ...]]  # the decoder's output, and what a pass traces


class Recorder(Protocol):
    """How jobs are recorded."""

    def record(self, job: Callable[[], T]) -> Callable[[], T]:
        """What runs the job again, on what its tensors hold by then. What it returns may be one object that
        each run overwrites."""


class EagerReplay:
    """No recording: the job itself is called again. Runs on any device and gains no time."""

    def record(self, job: Callable[[], T]) -> Callable[[], T]:
        return job


class CudaGraphs:
    """CUDA graphs, one of its own memory for each job."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, job: Callable[[], T]) -> Callable[[], T]:
        with torch.cuda.device(self.device):
            # libraries make their workspaces in the first passes, which no capture can hold
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # as torch's documentation has it
                    job()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = job()

        def replay() -> T:
            graph.replay()
            return result

        return replay


class NeverWaiting(TorchDispatchMode):
    """Refuses, from inside, operations that a recording cannot hold: those for which the host waits for the device,
    and those that bring numbers of the host to it. A replay would go on with the first pass's, silently."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        result = function(*args, **(kwargs or {}))
        if _waits(name, args, result):
            raise BadInput(
                f"a pass cannot be recorded: its ranker or its model waits for the device ({name}); run it "
                "without CapturedPrefill, or rank by text-attention"
            )
        return result


def _waits(name: str, args: Any, result: Any) -> bool:
    if name in _READING:
        return True
    if name in _INDEXING:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "aten::lift_fresh":  # a tensor made of Python's numbers
        return bool(args[0].numel())
    if name not in _COPYING:
        return False
    source = args[1] if name == "aten::copy_" else args[0]
    return bool(source.numel()) and source.device != result.device


class CapturedPrefill:
    """Records the decoder's prefills on a model, reduced or not, and replays them: same results, less time.

    ``with apply(model, reduction) as handle, CapturedPrefill(model, handle): model.generate(**inputs)``, or
    `remove()`. The first pass of a shape records, which takes a few passes' time; later ones copy their
    inputs in and replay. Prompts are of one shape where batch, images' token counts (N) and bucketed length
    agree: columns that no token of the prompt sees are put behind it, up to a multiple, and are gone from
    outputs and cache. Decoding, passes without a vision token under a reduction, and whatever else is no
    plain prefill (gradients, autocast, hidden states or attentions as output, a cache of another kind or one
    that is filled, a finished mask of more than two dimensions that would have to grow) run as they do
    without this.

    Hooks on the decoder's modules run when a pass is recorded, not when it is replayed. Results are copies, so they
    stay as they are; hidden states at padding have no meaning. Remove it before the model is moved, changed or copied.

    Args:
        model: a supported model, on one CUDA device.
        handle: of the reduction that is on it; None for the model as it is.
        multiple: lengths are bucketed to multiples of this, from 1.
        most: shapes to hold; the one used longest ago is forgotten.
        recorder: how to record; CUDA graphs if not given.

    Raises:
        ThinsightError: a model, reduction or device with which no pass can be recorded; or, from a pass, a
            ranker or a model that asks the device for numbers on the way.
    """

    def __init__(
        self,
        model: Any,
        handle: Handle | None = None,
        *,
        multiple: int = 16,
        most: int = 16,
        recorder: Recorder | None = None,
    ) -> None:
        self._model = model = _checked(model, handle, recorder)
        for name, value in (("multiple", multiple), ("most", most)):
            if not isinstance(value, int) or value < 1:
                raise BadInput(f"{name} is {value!r}; make it a whole number from 1")
        self.handle = handle
        self.multiple = multiple
        self.most = most
        self.replayed = 0  # passes
        self._recorder = CudaGraphs(model_device(model)) if recorder is None else recorder
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._shaped: tuple[Plan | None, Plan | None, Any] = (None, None, None)
        self._lock = threading.Lock()  # buffers and what is replayed serve one pass at a time
        self._decoder: Any = decoder(model)
        self._own = self._decoder.__dict__.get("forward")  # device maps put one there
        self._forward: Callable[..., Any] = self._decoder.forward
        self._decoder.forward = self._pass

    def __repr__(self) -> str:
        return f"CapturedPrefill({type(self._model).__name__}, {self.recorded} shapes, {self.replayed} replayed)"

    @property
    def recorded(self) -> int:
        """How many shapes are held."""
        return len(self._recorded)

    def remove(self) -> None:
        """Give the model back as it was, and the memory. Safe to call twice."""
        if self._decoder.__dict__.get("forward") == self._pass:
            del self._decoder.forward
            if self._own is not None:
                self._decoder.forward = self._own
        self._recorded.clear()
        self._shaped = (None, None, None)

    def __enter__(self) -> CapturedPrefill:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    # --- one pass

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        # 1) What the reduction's hooks have read of the inputs on the way here says where vision tokens are.
        run = None if self.handle is None else self.handle.local.run
        plan = None if run is None or run.first else run.plan
        if args or not self._recordable(kwargs, plan):
            return self._forward(*args, **kwargs)

        # 2) Bring the inputs to a length that few prompts do not share.
        seq = kwargs["inputs_embeds"].shape[1]
        tensors, constants = self._inputs(kwargs, plan)

        # 3) Copy them into the buffers that the recording of this shape reads, and replay. Recorded tensors
        # outlive this pass, so they may not be inference tensors, which cannot be written to outside.
        with torch.inference_mode(False), torch.no_grad(), self._lock:
            output, trace = self._ready(tensors, constants, plan).replay()
            self.replayed += 1
            # 4) The next replay writes over what this one gives: the caller gets copies.
            result = _own_output(output, seq, cache_of(kwargs))
            if run is not None:
                run.trace = tuple((layer, alive.clone()) for layer, alive in trace)
        return result

    def _recordable(self, kwargs: dict[str, Any], plan: Plan | None) -> bool:
        """Whether a call of the decoder is a plain prefill."""
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        if plan is None:  # the layers must run as without a reduction
            stock = not applied(self._model) if self.handle is None else self.handle.on
            if not stock or (self.handle is not None and not self.handle.schedule.is_full):
                return False
        if autocasts(model_device(self._model)):
            return False  # weights that it has cast live as long as its context, not as the recording
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or embeds is None or embeds.shape[1] == 1:
            return False
        config, cached = self._decoder.config, kwargs.get("use_cache")
        asked = [name for name in (*vars(config), *kwargs) if name.startswith("output_")]
        if any(kwargs.get(name, getattr(config, name, False)) for name in asked):
            return False
        grows = embeds.shape[1] % self.multiple
        return (
            (config.use_cache if cached is None else cached)
            and not is_paged(kwargs)
            and _empty(cache_of(kwargs))
            and (mask is None or (isinstance(mask, Tensor) and (mask.ndim == 2 or not grows)))
            # what is no tensor must be the same for every pass that says the same: it is part of the shape
            and all(name in _TENSORS or value is None or isinstance(value, _PLAIN) for name, value in kwargs.items())
        )

    def _inputs(self, kwargs: dict[str, Any], plan: Plan | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The call with its columns brought to the bucket's length, without its cache: tensors, and the rest."""
        embeds, positions, mask = (kwargs.get(name) for name in _TENSORS[:3])
        assert embeds is not None
        more = -embeds.shape[1] % self.multiple
        tensors = {
            "inputs_embeds": pad(embeds, (0, 0, 0, more)),
            "position_ids": None if positions is None else pad(positions, (0, more)),
            "attention_mask": self._mask(mask, embeds, more, plan),
        }
        constants = {name: value for name, value in kwargs.items() if name not in _TENSORS and value is not None}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}, constants

    def _mask(self, mask: Tensor | None, embeds: Tensor, more: int, plan: Plan | None) -> Tensor | None:
        """The mask as attention takes it; None where nothing but what comes later is hidden."""
        if mask is None or mask.ndim != 2:
            return mask
        real = mask.to(embeds.device, torch.bool)
        if plan is None:
            full = bool(real.all())
        else:  # which knows on the host whether any row has padding
            layout = plan.call.layout
            rows = zip(layout.text, layout.sizes, strict=True)
            full = all(text + sum(sizes) == plan.call.seq for text, sizes in rows)
        if full:
            return None
        length = embeds.shape[1] + more
        seen = pad(real, (0, more))[:, None, None] & causal(length, length, "sdpa", embeds.device)
        # padding sees itself: a softmax over nothing is no number, and would spread
        seen = seen | torch.eye(length, dtype=torch.bool, device=embeds.device)
        if self._decoder.config._attn_implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(embeds.dtype).min)

    # --- recordings

    def _ready(self, tensors: dict[str, Tensor], constants: dict[str, Any], plan: Plan | None) -> _Recorded:
        """The recording of this shape, with this pass's numbers in its buffers."""
        if plan is not self._shaped[0]:  # one that the caller made serves many passes
            shaped = None if plan is None else _bucketed(plan, self.multiple)
            self._shaped = plan, shaped, None if shaped is None else _shape_of(shaped)
        _, shaped, shape = self._shaped
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())
        key = (self._decoder.config._attn_implementation, shapes, tuple(sorted(constants.items())), shape)
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._record(tensors, constants, shaped)
            if len(self._recorded) > self.most:
                self._recorded.popitem(last=False)
        else:
            self._recorded.move_to_end(key)
            for name, tensor in tensors.items():
                recorded.tensors[name].copy_(tensor)
            if recorded.plan is not None and shaped is not None and recorded.read is not plan:
                for buffer, tensor in zip(recorded.plan.tensors(), shaped.tensors(), strict=True):
                    buffer.copy_(tensor)
        recorded.read = plan
        return recorded

    def _record(self, tensors: dict[str, Tensor], constants: dict[str, Any], plan: Plan | None) -> _Recorded:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        plan = None if plan is None else plan.mapped(lambda _, tensor: tensor.clone())

        def job() -> _Result:
            cache = DynamicCache(config=self._decoder.config)
            # a plan of its own: what it derives from its tensors belongs to one run
            run = None if plan is None else Pass(plan.mapped(lambda _, tensor: tensor))
            with ExitStack() as stack:
                if self.handle is not None and run is not None:
                    stack.enter_context(self.handle.local.having(run=run, made={}))
                    stack.callback(run.disarm)
                output = self._forward(**tensors, **{**constants, "use_cache": True, CACHE: cache})
            return output, () if run is None else run.trace

        with NeverWaiting():
            job()
        return _Recorded(tensors, plan, self._recorder.record(job))


@dataclass
class _Recorded:
    """A recording and the tensors that it reads."""

    tensors: dict[str, Tensor]
    plan: Plan | None
    replay: Callable[[], _Result]
    read: Plan | None = None  # the pass's own plan whose numbers are in `plan`


def _shape_of(plan: Plan) -> tuple[Any, ...]:
    """What passes must have in common for one to run on the other's tensors: all that is on the host."""
    call, absent = plan.call, [each is None for each in (plan.queries, plan.last, plan.quota, plan.call.received)]
    shapes = (tuple(tensor.shape) for tensor in plan.tensors())
    return (call.seq, call.past, call.layout.sizes, call.layout.text, plan.ends, *absent, *shapes)


def _bucketed(plan: Plan, multiple: int) -> Plan:
    """The plan of the same prompts with columns behind them up to a multiple, of a shape that few things set.

    All that is not vision counts as text, padding and the new columns included, so that how many columns a
    layer gets does not hang on it; they neither rank nor, by the mask, are seen by the prompt. More than one
    query column becomes a multiple, too.
    """
    call, queries = plan.call, plan.queries
    more = -call.seq % multiple
    seq = call.seq + more
    real = call.layout.real.new_ones(call.layout.real.shape[0], seq)
    text = tuple(seq - sum(sizes) for sizes in call.layout.sizes)
    layout = replace(call.layout, real=real, text=text)
    if queries is not None and queries[0].shape[1] > 1:
        unread = (0, -queries[0].shape[1] % multiple)
        queries = (pad(queries[0], unread), pad(queries[1], unread))
    return replace(
        plan, call=replace(call, seq=seq, layout=layout, prompt=pad(call.prompt, (0, more))), queries=queries
    )


def _checked(model: Any, handle: Handle | None, recorder: Recorder | None) -> PreTrainedModel:
    """The model without its wrappers; refuses what no pass can be recorded with."""
    model = check_supported(model)
    if handle is not None and not isinstance(handle, Handle):
        raise BadInput(f"handle is a {type(handle).__name__}; pass what apply(model, reduction) returns")
    if handle is None and applied(model):
        raise BadInput("a reduction is on the model; pass its handle, too")
    if handle is not None and handle.model is not model:
        raise BadInput("handle is of another model; pass the handle of a reduction on this model")
    if handle is not None and handle.adaptive is not None:
        raise Unsupported(
            "handle is of an adaptive reduction, whose schedule is read from each prompt on the way; record "
            "a reduction of one schedule"
        )
    implementation = attention_implementation(model)
    if implementation not in ATTENTION:
        raise Unsupported(
            f"attn_implementation is {implementation!r}, which asks the device about masks and positions; "
            f"load the model with one of {', '.join(ATTENTION)}"
        )
    if sliding_layers(model) or state_layers(model) or writes_vision_after(model) or sorts_by_kind(model):
        raise Unsupported(
            f"{type(model).__name__}: decoder layers with a sliding window, that carry a state, into which vision "
            "features are written, or with experts for vision tokens alone, cannot be recorded; run it without "
            "CapturedPrefill"
        )
    devices = {str(parameter.device) for parameter in decoder(model).parameters()}
    if len(devices) > 1:
        raise Unsupported(f"the decoder is on {', '.join(sorted(devices))}; put it on one device")
    if recorder is None and model_device(model).type != "cuda":
        raise Unsupported(
            f"the model is on {model_device(model)}, but a prefill is recorded as a CUDA graph; move the "
            "model to a CUDA device, or run it without CapturedPrefill"
        )
    return model


def _empty(cache: Any) -> bool:
    """Whether a cache is none yet, or a plain one that holds nothing."""
    if cache is None:
        return True
    plain = type(cache) is DynamicCache and not cache.offloading
    return plain and not cache.get_seq_length() and all(type(held) is DynamicLayer for held in cache.layers)


def _own_output(output: Any, seq: int, cache: DynamicCache | None) -> Any:
    """A copy of the decoder's output for its first `seq` columns, with the caller's cache filled."""
    found = output[CACHE]
    more = output.last_hidden_state.shape[1] - seq
    cache = copy.copy(found) if cache is None else cache
    records: dict[int, Kept] = {}  # layers of a stage share one
    cache.layers = [_own_layer(held, more, records) for held in found.layers]
    return type(output)(**{**output, "last_hidden_state": output.last_hidden_state[:, :seq].clone(), CACHE: cache})


def _own_layer(held: Any, more: int, records: dict[int, Kept]) -> Any:
    """A copy of a cache layer without its last `more` columns."""
    mine, length = copy.copy(held), held.keys.shape[-2] - more
    mine.keys, mine.values = (each[..., :length, :].clone() for each in (held.keys, held.values))
    if isinstance(held, Thinned) and held.kept is not None:
        kept = held.kept
        if id(kept) not in records:
            cut = kept.mapped(lambda _, tensor: tensor[:, :length].clone())
            records[id(kept)] = replace(cut, covered=kept.covered - more)
        mine.kept = records[id(kept)]
    return mine
