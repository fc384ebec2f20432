"""The stock model classes of vLLM, running on ever fewer vision tokens; and the worker that loads them.

`Reduced` is a mixin over a stock class. In a step that reads no images it does nothing but hand each stage its cache
slots; in one that does, hooks on the stock decoder layers take rows out of hidden states and positions for the length
of the step, which then runs uncompiled. Which rows is decided for all prompts of the step at once, and nothing of it
is asked of the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from ..errors import Unsupported
from ..ranking import STATES, TEXT_ATTENTION, VISION_ATTENTION, Context, Ranker, choose, row_weights, weighted_rows
from .ledger import Ledger, Step, reduced_backend
from .plan import PREFIX, Plan
from .settings import BACKENDS, has_runs, plan_of

RECEIVED = "thinsight_received"  # attribute of an encoder output: attention inside the tower, (tokens,) float32


def __getattr__(name: str) -> Any:
    """The reduced class of a stock one, by name; vLLM's registry asks for it."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
    globals()[name] = made = type(name, (Reduced, stock), {"__module__": __name__})
    return made


_base = "vllm.v1.worker.cpu_worker.CPUWorker" if current_platform.is_cpu() else "vllm.v1.worker.gpu_worker.Worker"


class Worker(resolve_obj_by_qualname(_base)):  # type: ignore[misc]
    """vLLM's worker, which tells the model's ledger where requests are known."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_model(*args, **kwargs)
        self.model_runner.get_model().ledger.runner = self.model_runner
        return result


class Reduced:
    """Mixin for a stock multimodal class: `type(name, (Reduced, Stock), {})`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.plan = plan_of(vllm_config)
        self.ledger = Ledger(self.plan)
        self._pass: Pass | None = None
        language = self.get_language_model()  # type: ignore[attr-defined]
        self._decoder = list(getattr(language, "model", language).layers)
        self._attention = [_attention_of(layer) for layer in self._decoder]
        self._names = [list(inspect.signature(layer.forward).parameters) for layer in self._decoder]
        self._parts: dict[tuple[int, int], list[str]] = {}  # names of attention, by run and stage
        runs = self.plan.runs if has_runs(vllm_config) else ()
        backends: dict[Any, Any] = {}
        for layer, attention in enumerate(self._attention):
            run = layer // len(runs[0]) if runs else 0
            stage = self.plan.stage_of(layer)
            if stage is None and not runs:
                continue
            if (run, stage) not in backends:
                backends[run, stage] = reduced_backend(attention.attn_backend, stage, run, bool(runs), self.ledger)
            attention.attn_backend = backends[run, stage]
            if stage is not None:
                self._parts.setdefault((run, stage), []).append(attention.layer_name)

    # -- the vision tower

    @cached_property
    def _tower_attention(self) -> Any:
        """The tower's last attention: stock classes build no layer behind those that the projector reads."""
        inside = {id(each) for each in self._attention}
        found = [m for m in self.modules() if isinstance(m, MMEncoderAttention) and id(m) not in inside]  # type: ignore[attr-defined]
        if not found:
            raise Unsupported(f"{type(self).__name__} has no vision attention that can be read; rank by text-attention")
        return found[-1]

    @cached_property
    def _has_class_token(self) -> bool:
        return any(hasattr(m, "class_embedding") or hasattr(m, "cls_token") for m in self.modules())  # type: ignore[attr-defined]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        stock = super().embed_multimodal  # type: ignore[misc]
        if not self.plan.needs(VISION_ATTENTION) or not self.plan.starts:
            return stock(**kwargs)
        read: list[Tensor] = []
        hook = self._tower_attention.register_forward_pre_hook(
            lambda module, args: read.append(_received(module, args[0], args[1], self._has_class_token))
        )
        try:
            outputs = list(stock(**kwargs))
        finally:
            hook.remove()
        received = torch.cat(read)  # (images or tiles, rows)
        if self._has_class_token:
            received = received[:, 1:]
        for output, row in zip(outputs, per_token(received, [len(each) for each in outputs]), strict=True):
            setattr(output, RECEIVED, row)
        return outputs

    def received(self, request: str) -> Tensor:
        """Attention inside the tower that a request's vision tokens received, in the order of the prompt."""
        runner = self.ledger.runner
        features = runner.requests[request].mm_features
        ordered = sorted(features, key=lambda feature: feature.mm_position.offset)
        return torch.cat([getattr(runner.encoder_cache[each.identifier], RECEIVED) for each in ordered])

    # -- the decoder

    def _get_deepstack_input_embeds(self, num_tokens: int) -> Any:
        """Qwen3-VL: what its decoder adds to rows behind its first layers, for the rows that are left."""
        found = super()._get_deepstack_input_embeds(num_tokens)  # type: ignore[misc]
        return found if self._pass is None or found is None else _Rows(found, self._pass)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        stock = super().forward  # type: ignore[misc]
        context, step = get_forward_context(), self.ledger.step
        active = self.plan.starts and context.attn_metadata is not None and context.slot_mapping
        if not active or not (step.slots or step.prefixes):
            return stock(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if step.slots:
            own = {name: step.slots[run][stage] for (run, stage), names in self._parts.items() for name in names}
            context.slot_mapping = {**context.slot_mapping, **own}
        if not step.prefills and not step.prefixes:
            return stock(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        context.skip_compiled = True
        given = inputs_embeds if inputs_embeds is not None else input_ids
        assert given is not None
        self._pass = run = Pass(self, step, given)
        try:
            return stock(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        finally:
            run.end()
            self._pass = None


def _attention_of(layer: nn.Module) -> Any:
    """The attention of a decoder layer, if its cache can lack tokens."""
    found = [m for m in layer.modules() if isinstance(m, Attention)]
    if len(found) != 1:
        raise Unsupported(f"a decoder layer of this model has {len(found)} attention modules; a reduction needs one")
    backend = found[0].attn_backend.get_name()
    if backend not in BACKENDS:
        raise Unsupported(f"attention backend {backend} cannot run a reduction; choose one of {', '.join(BACKENDS)}")
    if found[0].sliding_window is not None:
        raise Unsupported("a decoder layer attends within a sliding window, which would count tokens that are gone")
    return found[0]


class _Rows:
    """Tensors of a step's rows by name, each as the rows are when it is asked for."""

    def __init__(self, tensors: Any, run: Pass) -> None:
        self._tensors, self._run = tensors, run

    def __len__(self) -> int:
        return len(self._tensors.tensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor if self._run.rows is None else tensor[self._run.rows]


class Pass:
    """A step in which prompts are reduced, on its way through the decoder."""

    def __init__(self, model: Any, step: Step, given: Tensor) -> None:
        self.model, self.step, self.plan = model, step, model.plan
        plan: Plan = model.plan
        self.device, self.total = given.device, len(given)  # with padding
        self.rows: Tensor | None = None  # (rows left,) int64: the step's rows that are there; None: all
        self._read: tuple[Tensor, Tensor] | None = None  # query and key of the attention just run
        self._hooks: list[Any] = []
        self._positions: Tensor | None = None
        self._merges = type(plan.ranker).merge is not Ranker.merge
        self._scores: Tensor | None = None
        attention, decoder = model._attention, model._decoder
        if plan.needs(TEXT_ATTENTION):
            for layer in plan.starts:
                hook = self._note(layer - 1) if layer else None
                if hook is not None:
                    self._hooks.append(attention[layer - 1].register_forward_pre_hook(hook))
        if not step.prefills:
            return
        self._lay_out()
        for layer in range(plan.starts[0], plan.schedule.num_layers):
            hook = self._reduce(layer)
            self._hooks.append(decoder[layer].register_forward_pre_hook(hook, with_kwargs=True))
        self._hooks.append(decoder[-1].register_forward_hook(self._spread))

    def end(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        for prefill in self.step.prefills:
            self.model.ledger.prefix_keys.pop(prefill.request, None)

    def _lay_out(self) -> None:
        """Describe the prompts that are reduced, as (prompts, tokens) tensors on the device."""
        device = self.device
        prompts = [prefill.prompt for prefill in self.step.prefills]
        shape = (len(prompts), max(len(prompt.vision) for prompt in prompts))
        table = np.zeros((5, *shape), dtype=np.int64)  # column, image, index, size, valid
        last = np.zeros(shape, dtype=bool)  # the token that a prompt ends in, which stays
        width = max(len(prompt.queries) for prompt in prompts)
        queries = np.zeros((2, len(prompts), width), dtype=np.int64)  # row, real
        groups = max(len(row) for prompt in prompts for row in prompt.kept)
        quota = np.zeros((len(self.plan.starts), len(prompts), groups), dtype=np.int64)
        for number, (prefill, prompt) in enumerate(zip(self.step.prefills, prompts, strict=True)):
            n, offset = len(prompt.vision), prefill.start - prefill.first
            table[:, number, :n] = prompt.vision + offset, prompt.image, prompt.index, prompt.size, np.ones(n)
            last[number, :n] = prompt.vision == prompt.length - 1
            queries[:, number, : len(prompt.queries)] = prompt.queries + offset, np.ones(len(prompt.queries))
            for stage, row in enumerate(prompt.kept):
                quota[stage, number, : len(row)] = row

        def there(array: np.ndarray) -> Tensor:
            host = torch.from_numpy(array)
            return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)

        self._column, self._image, self._index, self._size, valid = there(table)
        self._alive = self._valid = valid.bool()
        self._last = there(last) if last.any() else None
        self._queries, real = there(queries)
        self._real = real.bool()
        self._weights = row_weights(self._real)
        self._group = self._image if self.plan.per == "image" else torch.zeros_like(self._image)
        self._quota = there(quota)
        self._tower: Tensor | None = None
        if self.plan.needs(VISION_ATTENTION):
            rows = [self.model.received(prefill.request) for prefill in self.step.prefills]
            self._tower = nn.utils.rnn.pad_sequence(rows, batch_first=True)

    # -- hooks, in the order in which a step comes to them

    def _note(self, layer: int) -> Callable[..., None]:
        """Before the attention of the layer in front of a stage: keep its queries and keys, rotated already."""
        attention = self.model._attention[layer]

        def hook(module: nn.Module, args: Any) -> None:
            query, key = args[:2]
            key = key.view(-1, attention.num_kv_heads, attention.head_size)
            self._read = query.view(-1, attention.num_heads, attention.head_size), key
            starts = self.step.starts
            for prefix in self.step.prefixes:
                own = starts if starts is not None else self.step.key.numpy()[None]
                stage = sum(start <= layer for start in self.plan.starts) if starts is not None else 0
                rows = key[int(own[stage][prefix.number]) : int(own[stage][prefix.number + 1])].clone()
                kept = self.model.ledger.prefix_keys.setdefault(prefix.request, {})
                before = kept.get(layer) if prefix.first else None
                kept[layer] = rows if before is None else torch.cat([before, rows])

        return hook

    def _reduce(self, layer: int) -> Callable[..., Any]:
        """Before a decoder layer: drop what it does not get."""
        names = self.model._names[layer]
        stage = self.plan.starts.index(layer) if layer in self.plan.starts else None

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            if stage is not None:
                self._drop(stage, given)
                self._positions = given["positions"][..., self.rows]
            given["positions"] = self._positions
            return (), given

        return hook

    def _spread(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Behind the last layer: rows are where the caller has them, those that are gone zero."""
        rows, self.rows = self.rows, None
        outputs = output if isinstance(output, tuple) else (output,)
        spread = tuple(
            None if x is None else x.new_zeros(self.total, *x.shape[1:]).index_copy_(0, rows, x) for x in outputs
        )
        return spread if isinstance(output, tuple) else spread[0]

    # -- what they do

    def _drop(self, stage: int, given: dict[str, Any]) -> None:
        """Rank, choose, and take the rows that stay out of a layer's arguments."""
        hidden, residual = given["hidden_states"], given.get("residual")
        ranker, layer = self.plan.ranker, self.plan.starts[stage]
        anew = [prefill.prompt.ranks[stage] for prefill in self.step.prefills]
        context = None
        if any(anew) or self._merges:
            context = self._context(stage, layer, hidden, residual)
        if context is not None and any(anew):
            scores = ranker.score(context).to(self.device)
            if self._scores is not None and not all(anew):
                mask = torch.tensor(anew, device=self.device)[:, None]
                scores = torch.where(mask, scores, self._scores)
            self._scores = scores
        if self._scores is not None:
            scores = self._scores if self._last is None else self._scores.masked_fill(self._last, torch.inf)
            self._alive = choose(scores, self._alive, self._group, self._quota[stage].gather(1, self._group))
        if self._merges and context is not None:
            hidden, residual = self._merged(context, hidden, residual)
        assert self.step.starts is not None
        total = int(self.step.starts[1 + stage][-1])
        wanted = torch.ones(self.step.tokens + 1, dtype=torch.bool, device=self.device)
        wanted.scatter_(0, self._column.where(self._valid, self.step.tokens).flatten(), self._alive.flatten())
        there = wanted[: self.step.tokens] if self.rows is None else wanted[self.rows]
        take = torch.nonzero_static(there, size=total).flatten()  # how many is known: no question to the device
        self.rows = take if self.rows is None else self.rows[take]
        given["hidden_states"] = hidden[take]
        if residual is not None:
            given["residual"] = residual[take]

    def _places(self, rows: Tensor) -> Tensor:
        """Where rows of the step stand among those that are there; rows that are gone: anywhere."""
        if self.rows is None:
            return rows
        there = torch.zeros(self.step.tokens, dtype=torch.long, device=self.device)
        there[self.rows] = torch.arange(len(self.rows), device=self.device)
        return there[rows]

    def _context(self, stage: int, layer: int, hidden: Tensor, residual: Tensor | None) -> Context:
        """What the ranker is told."""
        queries, columns = self._places(self._queries.clamp(min=0)), self._places(self._column)
        pooled = attention = states = text = None
        if self.plan.needs(TEXT_ATTENTION) and layer:  # a staged ranker reads another thing before layer 0
            attention = self._rows_of_attention(stage, layer, queries, columns)
            if self.plan.ranker.pools:
                pooled, attention = weighted_rows(attention, self._weights), None
                if (split := get_tensor_model_parallel_world_size()) > 1:
                    pooled = tensor_model_parallel_all_reduce(pooled) / split
        if self.plan.needs(STATES):
            whole = hidden if residual is None else hidden + residual
            states, text = whole[columns], whole[queries]
        return Context(
            layer=layer,
            valid=self._alive,
            image=self._image,
            index=self._index,
            size=self._size,
            attention=attention,
            pooled=pooled,
            queries=self._real,
            vision_attention=self._tower,
            states=states,
            text_states=text,
        )

    def _rows_of_attention(self, stage: int, layer: int, queries: Tensor, columns: Tensor) -> Tensor:
        """The softmax of the text rows that rank, over their prompts' keys: (prompts, heads, rows, tokens) float32."""
        assert self._read is not None
        assert self.step.starts is not None
        query, key = self._read
        self._read = None
        attention = self.model._attention[layer - 1]
        starts = self.step.starts[stage]  # as the layer in front of the stage has them
        bounds = [(int(starts[each.number]), int(starts[each.number + 1])) for each in self.step.prefills]
        keys = [key[first:end] for first, end in bounds]
        held = [self.model.ledger.prefix_keys.get(each.request, {}).get(layer - 1) for each in self.step.prefills]
        keys = [mine if before is None else torch.cat([before, mine]) for before, mine in zip(held, keys, strict=True)]
        lengths = [len(each) for each in keys]
        # place of a prompt's first row of this step among its keys, less its place in the step
        shift = [n - end for n, (_, end) in zip(lengths, bounds, strict=True)]
        offset = torch.tensor(shift, device=self.device)[:, None]
        k = nn.utils.rnn.pad_sequence(keys, batch_first=True).float()  # (prompts, keys, key heads, size)
        q = query[queries].float() * attention.impl.scale  # (prompts, rows, heads, size)
        heads = k.shape[2]
        grouped = q.view(*q.shape[:2], heads, q.shape[2] // heads, q.shape[3])
        logits = torch.einsum("prhgd,pkhd->phgrk", grouped, k).flatten(1, 2)  # (prompts, heads, rows, keys)
        cap = getattr(attention.impl, "logits_soft_cap", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        place = torch.arange(k.shape[1], device=self.device)
        later = place > (queries + offset)[:, None, :, None]
        rows = logits.masked_fill(later, -torch.inf).softmax(-1)
        wanted = (columns + offset).clamp(0, k.shape[1] - 1)[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1)
        return rows.gather(3, wanted)

    def _merged(self, context: Context, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states with what a ranker merges into the tokens that stay."""
        merged = self.plan.ranker.merge(context, self._alive)
        if merged is None:
            return hidden, residual
        # rows that take nothing are written to one row behind the last
        rows = self._places(self._column).where(self._alive, len(hidden)).flatten()
        padded = torch.cat([hidden, hidden[:1]])
        hidden = padded.index_copy(0, rows, merged.flatten(0, 1).to(hidden.dtype))[:-1]
        if residual is not None:  # the sum of the two is what a layer sees
            padded = torch.cat([residual, residual[:1]])
            residual = padded.index_fill(0, rows, 0)[:-1]
        return hidden, residual


def _received(module: Any, query: Tensor, key: Tensor, from_class_token: bool) -> Tensor:
    """What each row of the tower receives, the mean over heads: (images, rows) float32."""
    q = query.view(*query.shape[:2], module.num_heads, -1).transpose(1, 2).float() * module.scale
    k = key.view(*key.shape[:2], module.num_kv_heads, -1).transpose(1, 2).float()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    rows = q[:, :, :1] if from_class_token else q
    total = q.new_zeros(q.shape[0], k.shape[2])
    for part in rows.split(128, dim=2):  # bounds the memory
        total += (part @ k.transpose(2, 3)).softmax(-1).mean(1).sum(1)
    return total / rows.shape[2]


def per_token(received: Tensor, lengths: list[int]) -> list[Tensor]:
    """Attention per row of the tower, (images or tiles, rows), per token of each output, which holds one or more whole
    tiles; a token that stands for a block of rows gets their mean."""
    from ..runtime.encoding import fit_received

    return fit_received(list(received), lengths)
