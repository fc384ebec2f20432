"""Prompts: where images stand in them, what cannot be one, and images processed once for all questions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import PAD, VISION_TOKENS, tiny_images, tiny_llava, tiny_processor
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import thinsight as ts
from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluator, Example, rank_consistency
from thinsight.evaluation.prompts import PromptReader, collate, prompt_text
from thinsight.schedule import Schedule

IN_ORDER = (  # Qwen2-VL's
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><image><|vision_end|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
IMAGES_FIRST = (  # LLaVA-1.5's
    "{% for m in messages %}{{ m['role'] | upper + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}ASSISTANT:"
)
TEXT_FIRST = (
    "{% for m in messages %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'image' %}<img>{% endfor %}<end>{% endfor %}"
)
COLON = (  # SmolVLM's: without an image in front there is one space more
    "{% for m in messages %}User:{% if m['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<end>{% endfor %}"
)


def processor_with(template: str | None, token: str = "<vision>") -> Any:
    """One whose own image token is another one than data sets write."""
    processor = tiny_processor()
    processor.image_token = token
    processor.chat_template = template and template.replace("<image>", token)
    return processor


def asked(question: str, images: int = 2) -> Example:
    return Example("e7", tuple(tiny_images(images)), question)


# -- placeholders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "written", "front"),
    [
        (None, "<vision>", "USER: {} ASSISTANT:"),
        (IN_ORDER, "<|vision_start|><vision><|vision_end|>", "<|im_start|>user\n{}<|im_end|>\n"),
        (IMAGES_FIRST, "<vision>", "USER: {} ASSISTANT:"),
        (TEXT_FIRST, "<img>", "{}<end>"),
        (COLON, "<vision>", "User: {}<end>"),
    ],
)
@pytest.mark.parametrize(
    "question", ["is <image> or <image> red ?", "is <image 1> or <image 2> red ?", "is <image1> or <image_2> red ?"]
)
def test_placeholders_stand_for_the_models_own_image(
    template: str | None, written: str, front: str, question: str
) -> None:
    text = prompt_text(processor_with(template), asked(question))
    assert front.format(f"is {written} or {written} red ?") in text
    assert "<image" not in text


@pytest.mark.parametrize("template", [None, IN_ORDER, IMAGES_FIRST, TEXT_FIRST, COLON])
@pytest.mark.parametrize(
    "question", ["<image>\n<image>\nwhat color ?", " <image 1> <image 2>what color ?", "<image1><image2>\nwhat color ?"]
)
def test_placeholders_in_front_change_nothing(template: str | None, question: str) -> None:
    """As LLaVA's data has them: images come first anyway, in whatever way the template writes them."""
    processor = processor_with(template)
    assert prompt_text(processor, asked(question)) == prompt_text(processor, asked("what color ?"))


def test_numbers_stand_for_images_of_models_that_say_image_themselves() -> None:
    processor = tiny_processor()
    text = prompt_text(processor, asked("is <image 1> or <image 2> red ?"))
    assert text == prompt_text(processor, asked("is <image> or <image> red ?"))
    assert text == "USER: is <image> or <image> red ? ASSISTANT:"


def test_the_models_own_token_stays_where_it_is() -> None:
    processor = processor_with(IN_ORDER)
    text = prompt_text(processor, asked("is <vision> or <vision> red ?"))
    assert "is <vision> or <vision> red ?" in text


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        ("<image> or <image> ?", 1, "has 1 images but its question has 2 '<image>' tokens"),
        ("<image> ?", 2, "has 2 images but its question has 1 '<image>' tokens"),
        ("<vision> ?", 2, "has 2 images but its question has 1 '<vision>' tokens"),
        ("<image 2> or <image 1> ?", 2, "places its images as <image 2>, <image 1>: number them from 1"),
        ("<image 0> or <image 1> ?", 2, "places its images as <image 0>, <image 1>"),
        ("<image 2> ?", 1, "places its images as <image 2>"),
        ("<image> or <image 2> ?", 2, "places its images as <image>, <image 2>"),
        ("<image 1> or <image 1> ?", 2, ".* name each once"),
        ("<image 1> or <image 99999999999999999999> ?", 2, ".* number them from 1"),
    ],
)
def test_placeholders_that_do_not_match_are_refused(question: str, images: int, message: str) -> None:
    with pytest.raises(ThinsightError, match=f"example 'e7' {message}"):
        prompt_text(processor_with(IN_ORDER), asked(question, images))


@pytest.mark.parametrize("name", ["demo", "demo-internvl"])
def test_the_demos_read_placeholders(name: str) -> None:
    model, processor = ts.load_demo(name=name)
    plain, styled, inside = (
        PromptReader(model, processor).prompts([asked(question, 1)])[0]
        for question in ("what color ?", "<image>\nwhat color ?", "what <image 1> color ?")
    )
    assert torch.equal(plain.input_ids, styled.input_ids)
    assert inside.n_vision == plain.n_vision
    assert sorted(inside.input_ids.tolist()) == sorted(plain.input_ids.tolist())
    tokens = [prompt.input_ids.tolist() for prompt in (plain, inside)]
    what, image = processor.tokenizer.convert_tokens_to_ids("what"), model.config.image_token_id
    assert [each.index(what) < each.index(image) for each in tokens] == [False, True]


# -- what cannot be a prompt ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0]['content'][0]['no']['such'] }}", "UndefinedError"),
        ("{{ raise_exception('one turn\nonly') }}", "one turn only"),
        ("{{ messages[0]['content'] + 'x' }}", "TypeError"),
        ("{% for i in range(1000000000) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, reason: str) -> None:
    processor = processor_with(template, "<image>")
    with pytest.raises(ThinsightError, match=f"chat template fails on the prompt of example 'e7' .*{reason}") as caught:
        Evaluator(tiny_llava(), processor, [asked("what ?", 1)])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_pad_token_will_do() -> None:
    examples = [asked("what ?", 1), Example("e8", tuple(tiny_images(1)), "what color is the circle ?", ("red",))]
    expected = Evaluator(tiny_llava(), tiny_processor(), examples, batch_size=2)
    batch = PromptReader(tiny_llava(), tiny_processor()).batch(examples)
    processor = tiny_processor()
    processor.tokenizer.pad_token = None
    found = Evaluator(tiny_llava(), processor, examples, batch_size=2)
    assert found.full_answers == expected.full_answers
    schedule = Schedule([1, 0.5, 0.5, 0.25])
    assert found(schedule).per_example.tolist() == expected(schedule).per_example.tolist()
    again = PromptReader(tiny_llava(), processor).batch(examples)
    assert torch.equal(again["attention_mask"], batch["attention_mask"])
    real = batch["attention_mask"].bool()
    assert torch.equal(again["input_ids"][real], batch["input_ids"][real])


def test_a_batch_is_what_the_processor_makes_of_all() -> None:
    processor = tiny_processor()
    examples = [
        Example("1", tuple(tiny_images(1, size=40)), "what color is the circle ?"),
        Example("2", tuple(tiny_images(2, seed=1)), "same ?"),
    ]
    texts = [prompt_text(processor, example) for example in examples]
    images = [list(example.images) for example in examples]
    expected = processor(text=texts, images=images, return_tensors="pt", padding=True)
    found = PromptReader(tiny_llava(), processor).batch(examples)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert found["input_ids"][0, 0] == PAD or found["input_ids"][1, 0] == PAD


PROCESSORS = [  # of the supported families; transformers has some with torchvision only
    *("AriaImageProcessorPil", "CLIPImageProcessorPil", "Cosmos3EdgeImageProcessorPil", "DeepseekVLImageProcessorPil"),
    *("DeepseekVLHybridImageProcessorPil", "Gemma3ImageProcessorPil", "GlmgaImageProcessorPil"),
    *("DeepseekOcr2ImageProcessorPil", "GraniteDoclingImageProcessorPil"),
    *("JanusImageProcessorPil", "PPChart2TableImageProcessorPil", "PaddleOCRVLImageProcessorPil"),
    *("Glm46VImageProcessorPil", "Glm4vImageProcessorPil", "GotOcr2ImageProcessorPil"),
    *("Idefics2ImageProcessorPil", "Idefics3ImageProcessorPil", "LlavaImageProcessorPil"),
    *("LlavaNextImageProcessorPil", "LlavaOnevisionImageProcessorPil", "Ovis2ImageProcessorPil"),
    *("PixtralImageProcessorPil", "Qwen2VLImageProcessorPil", "SiglipImageProcessorPil"),
    *("SmolVLMImageProcessorPil", "VideoLlama3ImageProcessorPil", "VideoLlavaImageProcessor"),
]
NESTED = (
    *("GraniteDoclingImageProcessorPil", "Idefics2ImageProcessorPil", "Idefics3ImageProcessorPil"),
    "SmolVLMImageProcessorPil",
)


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_processed_alone_are_those_of_a_batch(name: str) -> None:
    """To the bit, and padded alike."""
    processor = getattr(transformers, name)()
    draw = np.random.default_rng(0)
    sizes = [[(30, 200)], [(64, 50), (33, 33)], [(150, 90)]]
    images = [[Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in each] for each in sizes]
    nested = name in NESTED
    alone = [processor([each] if nested else each, return_tensors="pt") for each in images]
    whole = processor(images if nested else [image for each in images for image in each], return_tensors="pt")
    assert set(whole) == set(alone[0])
    for key, value in whole.items():
        if isinstance(value, Tensor) and value.ndim:  # Aria's processor has a count for itself
            assert torch.equal(collate([each[key] for each in alone]), value), key


# -- lengths -------------------------------------------------------------------------------------------------

LONG = Example("long", tuple(tiny_images(1)), "red " * 600 + "?", ("red",))  # the tiny model has 512 positions
SHORT = Example("short", tuple(tiny_images(1)), "what ?", ("red",))


def test_a_prompt_that_is_too_long_is_warned_about_once() -> None:
    with pytest.warns(UserWarning, match=r"example 'long' has 6\d\d tokens, .* at most 512") as said:
        evaluator = Evaluator(tiny_llava(), tiny_processor(), [SHORT, LONG], max_new_tokens=1)
    tokens = len(evaluator._prompts[1])
    assert f"has {tokens} tokens" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator(Schedule.step(4, 2, 0.5))
        rank_consistency(tiny_llava(), tiny_processor(), [LONG], reader=evaluator.reader)
        Evaluator(tiny_llava(), tiny_processor(), [SHORT])


def test_so_many_images_that_no_model_could_read_them_are_refused() -> None:
    crowd = Example("crowd", tuple(tiny_images(200)), "how many ?")
    model = tiny_llava()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ThinsightError, match=r"example 'crowd' has 32\d\d tokens, .* at most 512 .*fewer"):
        Evaluator(model, tiny_processor(), [SHORT, crowd])


# -- images once ---------------------------------------------------------------------------------------------


class Counts:
    """How many files PIL opens, and how many images the processor is given."""

    def __init__(self) -> None:
        self.opened: list[Any] = []
        self.processed = 0


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    found = Counts()
    opening, processing = Image.open, CLIPImageProcessorPil.preprocess

    def opened(file: Any, *args: Any, **options: Any) -> Any:
        found.opened.append(file)
        return opening(file, *args, **options)

    def processed(self: Any, images: Any, *args: Any, **options: Any) -> Any:
        found.processed += sum(len(each) if isinstance(each, list) else 1 for each in images)
        return processing(self, images, *args, **options)

    monkeypatch.setattr(Image, "open", opened)
    monkeypatch.setattr(CLIPImageProcessorPil, "preprocess", processed)
    return found


def test_22_images_are_opened_and_processed_22_times(counts: Counts) -> None:
    examples = ts.load_examples("demo:test", limit=64)
    assert len({example.image_keys for example in examples}) == 22
    assert (len(counts.opened), counts.processed) == (22, 0)
    model, processor = ts.load_demo()
    evaluator = Evaluator(model, processor, examples, max_new_tokens=1)
    assert (len(counts.opened), counts.processed) == (22, 22)
    assert len(evaluator.full_answers) == 64
    evaluator(Schedule([1.0] * 3 + [0.25] * 9))
    evaluator(ts.Reduction(Schedule([1.0] * 2 + [0.3] * 10), "vision-attention"))
    rank_consistency(model, processor, examples[:8], reader=evaluator.reader)
    assert (len(counts.opened), counts.processed) == (22, 22)


def files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, image in zip(paths, tiny_images(count), strict=True):
        image.save(path)
    return paths


@pytest.mark.parametrize("options", [{}, {"batch_size": "auto"}, {"cache_gib": 0}, {"reuse": False}])
def test_an_evaluator_reads_each_set_of_images_once(options: dict[str, Any], counts: Counts, tmp_path: Path) -> None:
    one, two, three = files(tmp_path, 3)
    sets = [(one,), (two,), (one, two), (two, one), (three,)]
    examples = [Example(f"{i}{q}", each, q) for i, each in enumerate(sets) for q in ("what ?", "how many ?")]
    evaluator = Evaluator(tiny_llava(), tiny_processor(), examples, max_new_tokens=2, **options)
    evaluator(Schedule.step(4, 1, 0.5))
    assert counts.processed == sum(map(len, sets))
    assert len(counts.opened) == sum(map(len, sets))


def test_features_on_disk_need_no_pixels_but_for_the_prompt(counts: Counts, tmp_path: Path) -> None:
    examples = [Example(path.stem, (path,), "what ?") for path in files(tmp_path, 3)]
    for run in (1, 2):
        evaluator = Evaluator(tiny_llava(), tiny_processor(), examples, max_new_tokens=2, cache_dir=tmp_path / "kept")
        evaluator(Schedule.step(4, 1, 0.5))
        assert counts.processed == 3 * run


def test_an_image_that_cannot_be_read_is_found_before_the_model_runs(tmp_path: Path) -> None:
    paths = files(tmp_path, 3)
    paths[2].write_bytes(paths[2].read_bytes()[:900])
    examples = [Example(f"e{path.stem}", (path,), "what ?") for path in paths]
    model = tiny_llava()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ThinsightError, match=r"example 'e2': image '.*2.png' is truncated"):
        Evaluator(model, tiny_processor(), examples)


def test_the_processor_stays_as_it_is(tmp_path: Path) -> None:
    processor = tiny_processor()
    inside, before = processor.image_processor, processor.to_dict()
    examples = [Example(q, (files(tmp_path, 1)[0],), q) for q in ("what ?", "how many ?")]
    PromptReader(tiny_llava(), processor).prompts(examples)
    assert processor.image_processor is inside
    assert processor.to_dict() == before


def test_prompts_of_several_questions_are_those_of_each_alone(tmp_path: Path) -> None:
    model, processor = tiny_llava(), tiny_processor()
    paths = files(tmp_path, 2)
    examples = [Example(f"{p.stem}{q}", (p,), q) for q in ("what ?", "how many ?", "what ?") for p in paths]
    for example, prompt in zip(examples, PromptReader(model, processor).prompts(examples), strict=True):
        alone = PromptReader(model, processor).prompts([example])[0]
        assert torch.equal(prompt.input_ids, alone.input_ids)
        assert prompt.n_vision == alone.n_vision == VISION_TOKENS


def test_memory_that_runs_out_in_the_processor_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(CLIPImageProcessorPil, "preprocess", full)
    with pytest.raises(ThinsightError, match="images of example 'e7' do not fit into memory"):
        Evaluator(tiny_llava(), tiny_processor(), [asked("same ?")])


def test_a_resize_beyond_memory_is_refused() -> None:
    processor = tiny_processor()
    processor.image_processor.size = {"shortest_edge": 1024}
    strip = Example("strip", (Image.new("RGB", (190, 1)),), "what ?")
    with pytest.raises(ThinsightError, match="example 'strip': image has 190 x 1 pixels, which the processor would"):
        Evaluator(tiny_llava(), processor, [strip])
