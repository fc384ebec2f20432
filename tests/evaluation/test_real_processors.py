"""Processors of transformers itself, with a tokenizer of a few words, on models of the conformance table: prompts and
pixels that they make run through the evaluator as through `generate`.

Those that need torchvision are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from conformance.families import FAMILIES
from conformance.inputs import BOS, EOS, FIRST_WORD, PAD, VOCABULARY
from tiny import tiny_images
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluator, Example
from thinsight.evaluation.prompts import PromptReader, prompt_text
from thinsight.runtime import apply
from thinsight.schedule import Schedule

MARKS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<video>", "<start>", "<end>", "<break>", "<tile>"]
REDUCED = Schedule([1, 0.7, 0.4, 0])


def tokenizer(image: str = "<image>", **marks: str) -> PreTrainedTokenizerFast:
    """Words of the table's vocabulary; `image` is what its image token is called."""
    words = [mark if mark != "<image>" else image for mark in MARKS]
    words += [f"<{i}>" for i in range(len(words), FIRST_WORD)]
    words += ["USER:", "ASSISTANT:", "what", "is", "this", "?", "red"]
    words += [f"w{i}" for i in range(len(words), VOCABULARY)]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        additional_special_tokens=[image, "<start>", "<end>"],
        extra_special_tokens={"image_token": image, **marks},
        padding_side="left",
    )


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def paddleocr() -> Any:
    images = transformers.PaddleOCRVLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 20 * 20, "longest_edge": 40 * 40}
    )
    return transformers.PaddleOCRVLProcessor(images, tokenizer())


def deepseek_hybrid() -> Any:
    images = transformers.DeepseekVLHybridImageProcessorPil(size=square(28), high_res_size=square(64), min_size=4)
    return transformers.DeepseekVLHybridProcessor(images, tokenizer(), num_image_tokens=16)


def janus() -> Any:
    images = transformers.JanusImageProcessorPil(size=square(28), min_size=4)
    words = tokenizer(boi_token="<start>", eoi_token="<end>")
    return transformers.JanusProcessor(images, words, num_image_tokens=16)


def aria() -> Any:
    images = transformers.AriaImageProcessorPil()
    return transformers.AriaProcessor(images, tokenizer(), size_conversion={980: 12})


def qianfan() -> Any:
    images = transformers.GotOcr2ImageProcessorPil(size=square(42), crop_to_patches=True, max_patches=3)
    words = tokenizer(start_image_token="<start>", end_image_token="<end>", context_image_token="<image>")
    return transformers.QianfanOCRProcessor(images, words, image_seq_length=9)


def got_ocr2() -> Any:
    made = transformers.GotOcr2Processor(transformers.GotOcr2ImageProcessorPil(size=square(64)), tokenizer("<imgpad>"))
    made.num_image_tokens = 16
    return made


def deepseek_ocr2() -> Any:
    images = transformers.DeepseekOcr2ImageProcessorPil(size=square(48), tile_size=48, max_patches=2)
    return transformers.DeepseekOcr2Processor(images, tokenizer(), patch_size=4, downsample_ratio=4)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "paddleocr-vl": paddleocr,
    "deepseek-vl-hybrid": deepseek_hybrid,
    "janus": janus,
    "qianfan-ocr": qianfan,
    "got-ocr2": got_ocr2,
    "deepseek-ocr2": deepseek_ocr2,
    "aria": aria,
}


def built(name: str) -> Any:
    """The table's model; Aria's processor has images of 980 pixels, or half of that."""
    family = FAMILIES[name]
    if name == "aria":
        vision = {**family.config["vision_config"], "image_size": 980, "patch_size": 140}
        more = {"vision_config": vision, "projector_patch_to_query_dict": {49: 12}}
        family = replace(family, config={**family.config, **more})
    return family.build()


def asked(cut: bool = False) -> list[Example]:
    """Three questions; `cut`: the second one's image is larger than a tile of DeepSeek-OCR 2's, the others are not."""
    one, two, three = tiny_images(3, size=40)
    if cut:
        (two,) = tiny_images(1, seed=1, size=60)
    return [
        Example("a", (one,), "what is this ?", ("red",)),
        Example("b", (two,), "is this red ?", ("red",)),
        Example("c", (three,), "this ?", ("red",)),
    ]


@pytest.mark.parametrize("name", PROCESSORS)
def test_answers_are_those_of_generate(name: str) -> None:
    model, processor, examples = built(name), PROCESSORS[name](), asked(name == "deepseek-ocr2")
    evaluator = Evaluator(model, processor, examples, max_new_tokens=4, batch_size=2)
    nested = name != "got-ocr2"
    expected: list[list[str]] = [[], []]
    for example in examples:
        images = [list(example.images)] if nested else list(example.images)
        inputs = processor(text=[prompt_text(processor, example)], images=images, return_tensors="pt")
        inputs = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        inputs.pop("token_type_ids", None)
        for schedule, found in zip((Schedule.full(4), REDUCED), expected, strict=True):
            with apply(model, schedule):
                tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            found.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    assert evaluator.predictions(Schedule.full(4)) == expected[0]
    assert evaluator.predictions(REDUCED) == expected[1]
    assert expected[0] != expected[1]


def test_a_processor_that_asks_questions_of_its_own_is_refused() -> None:
    """ShieldGemma 2's makes a prompt of each policy, whatever it is asked."""
    words = tokenizer(boi_token="<start>", eoi_token="<end>")
    template = "{% for m in messages %}USER: <start> {{ m['content'][1]['text'] }} ASSISTANT:{% endfor %}"
    images = transformers.Gemma3ImageProcessorPil(size=square(56))
    processor = transformers.ShieldGemma2Processor(images, words, template, 16, {"one": "this red", "two": "what ?"})
    with pytest.raises(ThinsightError, match="ShieldGemma2Processor makes 2 prompts of example 'a'"):
        PromptReader(FAMILIES["shieldgemma2"].model(), processor).prompts(asked()[:1])


def test_ids_are_those_of_the_table() -> None:
    found = tokenizer()("<pad> <s> </s> <image> what")["input_ids"]
    assert found == [PAD, BOS, EOS, 4, FIRST_WORD + 2]
