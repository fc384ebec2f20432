"""The evaluator against plain `generate()` under `apply`, on tiny random models."""

from __future__ import annotations

import dataclasses
import errno

import numpy as np
import pytest
import torch
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight.evaluation.decoding as decoding
from thinsight.errors import BadInput, StorageError, ThinsightError, Unsupported
from thinsight.evaluation import Evaluation, Evaluator, Example
from thinsight.evaluation import store as feature_store
from thinsight.evaluation.metrics import Metric, get_metric
from thinsight.reduction import Reduction
from thinsight.runtime import apply
from thinsight.schedule import Schedule
from thinsight.searches import gsearch
from thinsight.searches.search import rankers_for

LAYERS = 4
NEW_TOKENS = 6
QUESTIONS = (
    "what color is the circle ?",
    "how many ?",
    "is the red square left of the blue star ?",
    "what number is written in the chart ?",
    "which ?",
)
SCHEDULES = {
    "mild": Schedule([1, 1, 1, 0.9]),
    "stairs": Schedule([1, 1, 0.6, 0.3]),
    "layer 0": Schedule([0.5, 0.5, 0.5, 0.2]),
    "to nothing": Schedule([1, 0.5, 0, 0]),
}


def make_model(attn="sdpa", seed=0):
    model = tiny_llava(attn=attn, layers=LAYERS, seed=seed)
    model.generation_config.eos_token_id = [3, *range(40, 52)]  # so that answers end at various lengths
    return model


def make_examples(count=11, answers=("red",), **fields):
    images = tiny_images(4)
    return [
        Example(f"e{i}", (images[i % 4],), QUESTIONS[i % len(QUESTIONS)], tuple(answers), **fields)
        for i in range(count)
    ]


def prompt_inputs(examples, batch):
    processor = tiny_processor()
    texts = [f"USER: <image>\n{examples[i].question} ASSISTANT:" for i in batch]
    return processor(text=texts, images=[examples[i].images[0] for i in batch], return_tensors="pt", padding=True)


def reference(model, examples, reduction, batch_size):
    """(tokens, text) of each example by plain generate() over left-padded batches in file order."""
    processor = tiny_processor()
    found = []
    with apply(model, reduction):
        for start in range(0, len(examples), batch_size):
            batch = range(start, min(start + batch_size, len(examples)))
            inputs = prompt_inputs(examples, batch)
            output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
            for row in output[:, inputs["input_ids"].shape[1] :].tolist():
                stop = next((k + 1 for k, t in enumerate(row) if t in model.generation_config.eos_token_id), len(row))
                text = processor.tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
                found.append((tuple(row[:stop]), text))
    return found


@pytest.fixture(scope="module")
def labeled():
    """Examples whose answers are the full model's for two thirds of them."""
    examples = make_examples()
    texts = [text for _, text in reference(make_model(), examples, Schedule.full(LAYERS), 1)]
    return [
        Example(e.id, e.images, e.question, (text if i % 3 else "something else", "red"))
        for i, (e, text) in enumerate(zip(examples, texts, strict=True))
    ]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_full_models_answers_are_those_of_generate(labeled, attn, batch_size):
    model = make_model(attn)
    evaluator = Evaluator(model, tiny_processor(), labeled, batch_size=batch_size, max_new_tokens=NEW_TOKENS)
    expected = reference(model, labeled, Schedule.full(LAYERS), 4)
    assert [tuple(answer) for answer in evaluator.full_answers] == expected
    assert len({len(tokens) for tokens, _ in expected}) > 1
    assert evaluator.full.per_example.tolist() == [float(i % 3 > 0) for i in range(len(labeled))]
    assert evaluator.full_score == pytest.approx(np.mean([i % 3 > 0 for i in range(len(labeled))]))
    assert evaluator(Schedule.full(LAYERS)).drop == 0


@pytest.mark.parametrize(
    ("name", "ranker"),
    [
        (name, ranker)
        for name in SCHEDULES
        for ranker in ("text-attention", "random", "vision-attention")
        if (name, ranker) != ("layer 0", "text-attention")  # no attention comes before layer 0
    ],
)
@pytest.mark.parametrize(("attn", "batch_size"), [("sdpa", 1), ("sdpa", 4), ("eager", 3)])
def test_scores_and_predictions_are_those_of_generate(labeled, attn, batch_size, name, ranker):
    model = make_model(attn)
    reduction = Reduction(SCHEDULES[name], ranker)
    evaluator = Evaluator(model, tiny_processor(), labeled, batch_size=batch_size, max_new_tokens=NEW_TOKENS)
    agreement = Evaluator(
        model, tiny_processor(), labeled, "agreement", batch_size=batch_size, max_new_tokens=NEW_TOKENS
    )
    expected = reference(model, labeled, reduction, 5)
    full = reference(model, labeled, Schedule.full(LAYERS), 5)
    scores = [get_metric("exact_match")(text, e.answers) for (_, text), e in zip(expected, labeled, strict=True)]

    result = evaluator(reduction)
    assert result.complete
    assert result.per_example.tolist() == scores
    assert result.score == pytest.approx(np.mean(scores))
    assert evaluator.predictions(reduction) == [text for _, text in expected]
    same = [float(tokens == whole) for (tokens, _), (whole, _) in zip(expected, full, strict=True)]
    assert agreement(reduction).per_example.tolist() == same
    assert agreement.full_score == 1
    assert agreement.predictions(reduction) == [text for _, text in expected]


def test_a_metric_of_ones_own_may_compare_with_the_full_models_answers(labeled):
    def overlap(prediction, answers):
        said, (full,) = set(prediction.split()), answers
        return len(said & set(full.split())) / max(1, len(said | set(full.split())))

    model, metric = make_model(), Metric("overlap", overlap, needs_answers=False)
    evaluator = Evaluator(model, tiny_processor(), labeled, metric, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert evaluator.full_score == 1
    reduction = Reduction(SCHEDULES["layer 0"], "random")
    pairs = zip(evaluator.predictions(reduction), evaluator.full_answers, strict=True)
    scores = [overlap(text, [full.text]) for text, full in pairs]
    assert evaluator(reduction).per_example.tolist() == scores
    assert any(0 < score < 1 for score in scores)
    with pytest.raises(ThinsightError, match=r"goes by_tokens .*set needs_answers=False"):
        Metric("overlap", overlap, by_tokens=True)


def test_the_schedules_above_tell_answers_apart(labeled):
    evaluator = Evaluator(
        make_model(), tiny_processor(), labeled, "agreement", ranker="random", max_new_tokens=NEW_TOKENS
    )
    shares = [evaluator(schedule).score for schedule in SCHEDULES.values()]
    assert any(0 < share < 1 for share in shares)
    assert shares[0] > shares[-1]


def test_repetition_penalty_is_that_of_generate(labeled):
    model = make_model()
    model.generation_config.repetition_penalty = 1.7
    plain = reference(make_model(), labeled, Schedule.full(LAYERS), 1)
    for schedule in (Schedule.full(LAYERS), SCHEDULES["stairs"]):
        expected = reference(model, labeled, schedule, 1)  # alone: some versions penalize padding too
        assert expected != plain
        evaluator = Evaluator(model, tiny_processor(), labeled, batch_size=3, max_new_tokens=NEW_TOKENS)
        assert evaluator.predictions(schedule) == [text for _, text in expected]


def test_an_image_token_inside_an_answer_is_no_image(labeled):
    """A random model may well say "<image>"; a drafted answer must not be read as having one."""
    model = make_model()
    tokens = [t for answer, _ in reference(model, labeled, Schedule.full(LAYERS), 4) for t in answer[:-1]]
    common = max(set(tokens), key=tokens.count)
    with torch.no_grad():  # exchange what the model says: the commonest token becomes the image token
        weight = model.lm_head.weight
        weight[[common, 4]] = weight[[4, common]]
    full = reference(model, labeled, Schedule.full(LAYERS), 4)
    assert any(4 in answer[:-1] for answer, _ in full)
    evaluator = Evaluator(model, tiny_processor(), labeled, "agreement", batch_size=4, max_new_tokens=NEW_TOKENS)
    expected = reference(model, labeled, SCHEDULES["mild"], 4)
    same = [float(a == b) for (a, _), (b, _) in zip(expected, full, strict=True)]
    assert evaluator(SCHEDULES["mild"]).per_example.tolist() == same
    assert evaluator.predictions(SCHEDULES["mild"]) == [text for _, text in expected]


def test_several_images_and_placed_image_tokens():
    model, (one, two, three) = make_model(), tiny_images(3)
    examples = [
        Example("1", (one, two), "what is in <image> and what <image> ?", ("red",)),
        Example("2", (two,), "what ?", ("red",)),
        Example("3", (three, one), "which ?", ("red",)),
    ]
    evaluator = Evaluator(model, tiny_processor(), examples, batch_size=3, max_new_tokens=NEW_TOKENS)
    texts = [
        "USER: what is in <image> and what <image> ? ASSISTANT:",
        "USER: <image>\nwhat ? ASSISTANT:",
        "USER: <image>\n<image>\nwhich ? ASSISTANT:",
    ]
    for schedule in (Schedule.full(LAYERS), SCHEDULES["stairs"]):
        predictions = evaluator.predictions(schedule)
        with apply(model, schedule):
            for example, text, said in zip(examples, texts, predictions, strict=True):
                inputs = tiny_processor()(text=text, images=list(example.images), return_tensors="pt")
                output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
                answer = output[0, inputs["input_ids"].shape[1] :]
                assert said == tiny_processor().tokenizer.decode(answer, skip_special_tokens=True).strip()


# -- cheapness -----------------------------------------------------------------------------------------------


class Counter:
    """Counts the rows that go through a module."""

    def __init__(self, module):
        self.calls = self.rows = 0
        module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        first = args[0] if args else kwargs.get("input_ids", kwargs.get("pixel_values"))
        self.calls += 1
        self.rows += first.shape[0]


def test_the_vision_tower_runs_once_per_image():
    model = make_model()
    tower = Counter(model.model.vision_tower)
    evaluator = Evaluator(model, tiny_processor(), make_examples(11), max_new_tokens=NEW_TOKENS, batch_size=4)
    evaluator(SCHEDULES["mild"])
    evaluator(SCHEDULES["stairs"])
    evaluator(Reduction(SCHEDULES["stairs"], "random"))
    assert tower.rows == 4


def test_agreement_takes_one_forward_pass_per_batch_and_nothing_twice():
    model = make_model()
    evaluator = Evaluator(model, tiny_processor(), make_examples(11), "agreement", batch_size=4, max_new_tokens=6)
    assert evaluator.full_score == 1
    forward = Counter(model)
    first = evaluator(SCHEDULES["stairs"])
    assert forward.calls == 3
    again = evaluator(Schedule([1, 1, 0.599, 0.299]))  # the same counts of 16 tokens
    assert forward.calls == 3
    assert again.per_example.tolist() == first.per_example.tolist()
    assert first.cost > 0
    assert again.cost == 0


def test_answers_that_can_score_nothing_are_not_finished():
    model = make_model()
    examples = make_examples(8, ("no answer of this model begins so",))
    evaluator = Evaluator(model, tiny_processor(), examples, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert evaluator.full_score == 0
    forward = Counter(model)
    assert evaluator(SCHEDULES["to nothing"]).score == 0
    assert forward.calls == 2
    whole = evaluator.predictions(SCHEDULES["to nothing"])
    assert forward.calls > 4  # step by step
    fresh = Evaluator(model, tiny_processor(), examples, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert whole == fresh.predictions(SCHEDULES["to nothing"])


def test_a_right_answer_takes_the_full_model_no_step(labeled):
    model = make_model()
    told = Evaluator(model, tiny_processor(), labeled, batch_size=4, max_new_tokens=NEW_TOKENS)
    blind = [dataclasses.replace(example, answers=()) for example in labeled]
    untold = Evaluator(model, tiny_processor(), blind, batch_size=4, max_new_tokens=NEW_TOKENS)
    assert told.full_answers == untold.full_answers
    assert [a.log_likelihood for a in told._full] == pytest.approx([a.log_likelihood for a in untold._full], abs=1e-4)
    right = [dataclasses.replace(labeled[0], answers=(told.full_answers[0].text,))]
    stop = told.full_answers[0].tokens[-1]
    model.generation_config.eos_token_id = stop
    processor = tiny_processor()
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(stop)
    forward = Counter(model)
    evaluator = Evaluator(model, processor, right, max_new_tokens=NEW_TOKENS)
    assert evaluator.full_score == 1
    assert forward.calls == 1


def test_cost_is_the_flops_of_prompts_and_drafts(labeled):
    from thinsight import cost

    model = make_model()
    evaluator = Evaluator(model, tiny_processor(), labeled, batch_size=3, max_new_tokens=NEW_TOKENS)
    schedule = SCHEDULES["stairs"]
    expected = 0.0
    for index, answer in enumerate(evaluator.full_answers):
        width = prompt_inputs(labeled, [index])["input_ids"].shape[1]
        n_text = width - 16 + len(answer.tokens) - 1
        expected += cost.flops(model.config, n_vision=16, n_text=n_text, schedule=schedule)
    assert evaluator(schedule).cost == pytest.approx(expected)
    assert evaluator.full.cost > 0


# -- stopping early ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["agreement", "exact_match"])
def test_at_least_decides_as_the_full_score_does(labeled, metric):
    exact = Evaluator(make_model(), tiny_processor(), labeled, metric, batch_size=2, max_new_tokens=NEW_TOKENS)
    early = Evaluator(make_model(), tiny_processor(), labeled, metric, batch_size=2, max_new_tokens=NEW_TOKENS)
    stopped = 0
    for floor in (0.0, 0.3, 0.5, 0.9, 1.0):
        for schedule in SCHEDULES.values():
            if schedule.keep_rates[0] < 1:
                continue
            whole, result = exact(schedule), early.at_least(schedule, floor)
            run = ~np.isnan(result.per_example)
            assert (result.score >= floor) == (whole.score >= floor)
            assert result.per_example[run].tolist() == whole.per_example[run].tolist()
            assert result.complete == run.all()
            if result.complete:
                assert result.score == whole.score
            else:
                stopped += 1
                assert whole.score <= result.score < floor
            assert result.full_score == whole.full_score
    assert stopped > 0


def test_at_least_runs_the_hardest_batches_first(labeled):
    evaluator = Evaluator(make_model(), tiny_processor(), labeled, "agreement", batch_size=2, max_new_tokens=6)
    lost = evaluator(SCHEDULES["stairs"]).per_example
    assert 0 < lost.sum() < len(lost)
    order = evaluator._order.hardest_first()
    means = [float(np.mean(1 - lost[batch])) for batch in order]
    assert means == sorted(means, reverse=True)
    result = evaluator.at_least(SCHEDULES["to nothing"], 0.999)
    assert not result.complete
    assert np.flatnonzero(~np.isnan(result.per_example)).tolist() == sorted(order[0])


def test_the_same_calls_give_the_same_results(labeled):
    def run():
        evaluator = Evaluator(make_model(), tiny_processor(), labeled, batch_size=2, max_new_tokens=NEW_TOKENS)
        results = [
            evaluator.at_least(s, 0.6) for s in (SCHEDULES["stairs"], SCHEDULES["mild"], SCHEDULES["to nothing"])
        ]
        return [(r.score, r.complete, r.per_example.tobytes()) for r in results]

    assert run() == run()


# -- the rest of the surface ---------------------------------------------------------------------------------


def test_what_a_search_reads(labeled):
    model = make_model()
    evaluator = Evaluator(model, tiny_processor(), labeled, ranker={"name": "random", "seed": 3})
    assert evaluator.num_layers == LAYERS
    assert evaluator.num_vision_tokens == 16
    widths = [prompt_inputs(labeled, [index])["input_ids"].shape[1] for index in range(len(labeled))]
    assert evaluator.prompt_sizes == [(16, width - 16) for width in widths]
    reduction = evaluator.reduction(SCHEDULES["mild"])
    assert reduction.schedule == SCHEDULES["mild"]
    assert reduction.ranker == {"name": "random", "seed": 3}
    assert reduction.model_type == "llava"


def test_fingerprint_names_model_data_metric_and_ranker(labeled):
    def fingerprint(model=None, examples=labeled, **settings):
        return Evaluator(model or make_model(), tiny_processor(), examples, **settings).fingerprint

    relabeled = [Example(e.id, e.images, e.question, ("green",)) for e in labeled]
    same = fingerprint()
    assert fingerprint() == same
    others = [
        fingerprint(make_model(seed=1)),
        fingerprint(examples=labeled[:-1]),
        fingerprint(examples=relabeled),
        fingerprint(metric="anls"),
        fingerprint(ranker="random"),
        fingerprint(max_new_tokens=9),
    ]
    assert len({same, *others}) == 1 + len(others)


@pytest.mark.parametrize("field", [each.name for each in dataclasses.fields(decoding.DecodingRules)])
def test_fingerprint_names_every_generation_rule(labeled, field):
    evaluator = Evaluator(make_model(), tiny_processor(), labeled)
    before, value = evaluator.fingerprint, getattr(evaluator.rules, field)
    other = {int: lambda: value + 1, float: lambda: value * 1.3, frozenset: lambda: value | {1}, tuple: lambda: (5,)}
    evaluator.rules = dataclasses.replace(evaluator.rules, **{field: other[type(value)]()})
    del evaluator.fingerprint
    assert evaluator.fingerprint != before


def test_fingerprint_names_all_that_a_score_depends_on(labeled):
    def fingerprint(change=lambda model, processor: None, attn="sdpa", **settings):
        model, processor = make_model(attn), tiny_processor()
        change(model, processor)
        return Evaluator(model, processor, settings.pop("examples", labeled), **settings).fingerprint

    def setting(name, value):
        return lambda model, processor: setattr(model.generation_config, name, value)

    asked = [dataclasses.replace(labeled[0], question=labeled[0].question + "\nA. red\nB. blue"), *labeled[1:]]
    others = [
        fingerprint(setting("repetition_penalty", 1.3)),
        fingerprint(setting("suppress_tokens", [7])),
        fingerprint(setting("eos_token_id", 3)),
        fingerprint(setting("pad_token_id", 1)),
        fingerprint(lambda model, processor: model.bfloat16()),
        fingerprint(lambda model, processor: model.lm_head.bfloat16()),
        fingerprint(lambda model, processor: setattr(processor.image_processor, "image_mean", [0.5] * 3)),
        fingerprint(lambda model, processor: setattr(processor.tokenizer, "clean_up_tokenization_spaces", True)),
        fingerprint(lambda model, processor: processor.tokenizer.add_tokens("purple")),
        fingerprint(attn="eager"),
        fingerprint(examples=asked),
    ]
    assert len({fingerprint(), *others}) == 1 + len(others)
    assert fingerprint(batch_size=2, reuse=False, cache_gib=0.1) == fingerprint()
    assert fingerprint(setting("temperature", 0.3)) == fingerprint()  # decoding is greedy


def test_a_journal_of_other_generation_rules_is_refused(tmp_path):
    def searched(penalty, resume):
        model = make_model()
        model.generation_config.repetition_penalty = penalty
        evaluator = Evaluator(model, tiny_processor(), make_examples(4, ()), max_new_tokens=3)
        return gsearch(evaluator, 0.5, step=8, study=tmp_path / "s", resume=resume)

    found = searched(1.0, resume=False)
    assert searched(1.0, resume=True).schedule == found.schedule
    with pytest.raises(BadInput, match=r"was made with fingerprint '.*resume with the same model"):
        searched(1.3, resume=True)


@pytest.mark.parametrize("name", decoding._REFUSED)
def test_a_generation_rule_that_scoring_does_not_follow_is_refused(name):
    model = make_model()
    setattr(model.generation_config, name, 7)
    with pytest.raises(Unsupported, match=f"{name} is 7"):
        Evaluator(model, tiny_processor(), make_examples(1))


def test_what_is_lost_early_is_lost_by_the_metric(labeled):
    """Along every answer of a reduced model: "red ." is right, and so decoding goes on behind it."""
    plain = Evaluator(make_model(), tiny_processor(), labeled, max_new_tokens=NEW_TOKENS)
    said = plain.predictions(SCHEDULES["to nothing"])
    tokenizer = tiny_processor().tokenizer
    for words in (1, 2, 3):
        answers = [" ".join(text.split()[:words]) for text in said]
        examples = [
            dataclasses.replace(each, answers=(answer or "x", f"{answer} ."))
            for each, answer in zip(labeled, answers, strict=True)
        ]
        evaluator = Evaluator(make_model(), tiny_processor(), examples, max_new_tokens=NEW_TOKENS)
        metric = get_metric("exact_match")
        wanted = [metric(text, each.answers) for text, each in zip(said, examples, strict=True)]
        assert evaluator(SCHEDULES["to nothing"]).per_example.tolist() == wanted
    evaluator = Evaluator(make_model(), tiny_processor(), make_examples(1), max_new_tokens=NEW_TOKENS)
    assert not evaluator._lost(0, tokenizer("red .", add_special_tokens=False)["input_ids"])
    assert evaluator._lost(0, tokenizer("red . red", add_special_tokens=False)["input_ids"])


def test_options_are_read_from_the_question(monkeypatch):
    monkeypatch.setattr(Evaluator, "_text", lambda self, tokens: "a dog")
    asked = "which ?\nA. a cat\nB. a dog"
    examples = [Example(label, (tiny_images(1)[0],), asked, (label,)) for label in ("A", "B", "a dog", "C")]
    evaluator = Evaluator(make_model(), tiny_processor(), examples, "multiple_choice", max_new_tokens=4)
    assert evaluator.full.per_example.tolist() == [0, 1, 1, 0]


# -- a full model that gets too little right -----------------------------------------------------------------


def test_a_full_model_that_gets_nothing_right_is_doubted_with_an_answer_beside_its_label():
    examples = make_examples(3, answers=("zzz" * 100,))
    evaluator = Evaluator(make_model(), tiny_processor(), examples, max_new_tokens=NEW_TOKENS)
    said = evaluator.full_answers[0].text
    assert evaluator.full_score == 0
    assert "scores 0.0 % (number of examples: 3): nothing can be lost" in evaluator.doubt
    assert f"To example 'e0' it says {said!r}, the label is 'zzz" in evaluator.doubt
    assert "(exact_match)" in evaluator.doubt
    assert len(evaluator.doubt) < 500
    assert "\n" not in evaluator.doubt
    assert evaluator(SCHEDULES["mild"]).score == 0  # to evaluate is no search


def test_agreement_is_never_doubted():
    assert Evaluator(make_model(), tiny_processor(), make_examples(2, ()), max_new_tokens=4).doubt == ""


def examples_that_are_right(count, right, question, wrong):
    """Of so many examples as many whose label is what the full model says."""
    images = tiny_images(4)
    asked = [Example(f"e{i}", (images[i % 4],), question) for i in range(count)]
    said = Evaluator(make_model(), tiny_processor(), asked, max_new_tokens=4).full_answers
    return [
        dataclasses.replace(each, answers=(answer.text if i < right else wrong,))
        for i, (each, answer) in enumerate(zip(asked, said, strict=True))
    ]


@pytest.mark.parametrize(("right", "doubted"), [(0, True), (1, True), (2, False), (40, False)])
def test_a_score_near_nothing_is_doubted(right, doubted):
    examples = examples_that_are_right(40, right, "which ?", "zzz")
    evaluator = Evaluator(make_model(), tiny_processor(), examples, max_new_tokens=4)
    assert evaluator.full_score == right / 40
    assert bool(evaluator.doubt) == doubted
    if right == 1:
        assert "scores 2.5 %" in evaluator.doubt
        assert "guessing gets 0.0 %, so hardly any loss can show" in evaluator.doubt
        assert "To example 'e1' it says" in evaluator.doubt  # the first one that is wrong


@pytest.mark.parametrize(("share", "doubted"), [(0.5, True), (0.65, True), (0.9, False)])
def test_a_score_near_chance_is_doubted(monkeypatch, share, doubted):
    """Yes or no: chance is 50 %, and 40 answers tell no difference of two standard errors, 16 points."""
    evaluator = Evaluator(make_model(), tiny_processor(), make_examples(40, ("yes",)), max_new_tokens=4)
    scores = np.arange(40) < round(share * 40)
    evaluator.full = Evaluation(float(scores.mean()), scores.astype(float))
    assert bool(evaluator.doubt) == doubted
    if doubted:
        assert "guessing gets 50.0 %" in evaluator.doubt


# -- what a ranker needs -------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_tried_is_no_ranker_that_cannot_rank():
    model = make_model()
    evaluator = Evaluator(model, tiny_processor(), make_examples(1))
    assert evaluator.can_rank("text-attention")
    with apply(model, SCHEDULES["mild"]), pytest.raises(BadInput, match="a reduction on already"):
        evaluator.can_rank("text-attention")
    with apply(model, SCHEDULES["mild"]), pytest.raises(BadInput, match="a reduction on already"):
        rankers_for(evaluator)
    assert evaluator.can_rank("text-attention")


def test_a_full_disk_is_no_ranker_that_cannot_rank(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    evaluator = Evaluator(make_model(), tiny_processor(), make_examples(1), cache_gib=0)
    monkeypatch.setattr(feature_store, "save_file", full)
    with pytest.raises(StorageError, match="cannot be written to a temporary file"):
        rankers_for(evaluator)
    monkeypatch.undo()
    assert len(rankers_for(evaluator)) == 4


def test_each_example_may_have_its_own_metric():
    examples = [
        Example("1", (tiny_images(1)[0],), "what ?", ("red",), metric="anls"),
        Example("2", (tiny_images(1)[0],), "what ?", ("red",)),
        Example("3", (tiny_images(1)[0],), "what ?"),
    ]
    evaluator = Evaluator(make_model(), tiny_processor(), examples)
    assert [metric.name for metric in evaluator._metrics] == ["anls", "exact_match", "agreement"]
    assert evaluator.full.per_example[2] == 1


def test_default_answer_length_covers_the_longest_answer():
    answers = ("red", "one two three four five")
    assert Evaluator(make_model(), tiny_processor(), make_examples(2, answers)).rules.max_new_tokens == 9
    assert Evaluator(make_model(), tiny_processor(), make_examples(2, ())).rules.max_new_tokens == 32


def test_progress_is_reported():
    seen = []
    evaluator = Evaluator(
        make_model(), tiny_processor(), make_examples(5), batch_size=2, progress=lambda *args: seen.append(args)
    )
    evaluator(SCHEDULES["mild"])
    full = [("full model", n, 5) for n in (2, 3, 5)]  # three images, then two questions about one
    reduced = [("reduced model", n, 5) for n in (2, 4, 5)]
    images = [("images", n, 5) for n in (2, 3, 4, 5)]  # the first and the fifth are about one
    assert seen == images + full + reduced


def test_the_model_is_as_before_afterwards(labeled, monkeypatch):
    model = make_model()
    evaluator = Evaluator(model, tiny_processor(), labeled, batch_size=4, max_new_tokens=NEW_TOKENS)
    inputs = prompt_inputs(labeled, range(3))
    before = model(**inputs).logits
    evaluator(SCHEDULES["stairs"])
    assert torch.equal(model(**inputs).logits, before)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decoding._Run, "step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluator.predictions(SCHEDULES["to nothing"])
    assert torch.equal(model(**inputs).logits, before)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "bleu"}, "metric is 'bleu'"),
        ({"ranker": "oracle"}, "oracle"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ThinsightError, match=message):
        Evaluator(make_model(), tiny_processor(), make_examples(2), **settings)


def test_bad_data_is_refused_before_anything_runs():
    model = make_model()
    forward = Counter(model)
    good = make_examples(2)
    bad = {
        "has no examples": [],
        "occurs twice": [good[0], good[0]],
        "has no answer, which metric": [Example("1", good[0].images, "what ?")],
        "2 '<image>' tokens": [Example("1", good[0].images, "<image> <image> ?", ("red",))],
    }
    for message, examples in bad.items():
        with pytest.raises(ThinsightError, match=message):
            Evaluator(model, tiny_processor(), examples, metric="anls")
    assert forward.calls == 0


def test_a_prompt_without_image_token_is_refused():
    processor = tiny_processor()
    processor.chat_template = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    with pytest.raises(ThinsightError, match=r"prompt of example 'e0' (does not fit|has no image token)"):
        Evaluator(make_model(), processor, make_examples(1))


def test_a_processor_of_another_model_is_refused():
    model = make_model()
    model.config.image_token_id = 90
    with pytest.raises(ThinsightError, match="no image token that LlavaForConditionalGeneration knows"):
        Evaluator(model, tiny_processor(), make_examples(1))


def test_a_chat_template_is_used():
    processor = tiny_processor()
    processor.chat_template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} answer{% endif %}{% endfor %}{% endfor %}"
    )
    model, example = make_model(), make_examples(1)[0]
    evaluator = Evaluator(model, processor, [example], max_new_tokens=NEW_TOKENS)
    text = f"<image> {example.question} answer"
    inputs = tiny_processor()(text=text, images=[example.images[0]], return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert evaluator.full_answers[0].tokens == tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


def test_unsupported_generation_settings_are_refused():
    model = make_model()
    model.generation_config.no_repeat_ngram_size = 2
    with pytest.raises(ThinsightError, match="no_repeat_ngram_size is 2"):
        Evaluator(model, tiny_processor(), make_examples(1))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ThinsightError, match="training mode"):
        Evaluator(make_model().train(), tiny_processor(), make_examples(1))


def test_a_model_under_a_reduction_is_refused():
    model = make_model()
    evaluator = Evaluator(model, tiny_processor(), make_examples(1))
    with apply(model, SCHEDULES["mild"]), pytest.raises(ThinsightError, match="a reduction on already"):
        evaluator(SCHEDULES["mild"])
    assert evaluator.full_score == 0


def test_an_unsupported_model_is_refused():
    with pytest.raises(ThinsightError, match="Linear"):
        Evaluator(torch.nn.Linear(1, 1).eval(), tiny_processor(), make_examples(1))


def test_a_schedule_of_another_depth_is_refused():
    evaluator = Evaluator(make_model(), tiny_processor(), make_examples(1))
    with pytest.raises(ThinsightError, match="7 layers but the model has 4"):
        evaluator(Schedule.step(7, 2, 0.5))
