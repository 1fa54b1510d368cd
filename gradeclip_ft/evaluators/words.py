"""Maps of texts: faithfulness over words, and whether concrete words matter more.

Faithfulness (Grad-ECLIP, Tables 3 and 6): words leave a caption, or enter an empty one in their
original order, the most important first. Concreteness is the study of the journal's Figure 18.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from gradeclip_ft.data.files import ImageSet, Source
from gradeclip_ft.evaluators.base import Track, evaluating, untracked
from gradeclip_ft.evaluators.curves import DELETION, INSERTION, summarise
from gradeclip_ft.evaluators.embed import encode_pairs
from gradeclip_ft.evaluators.maps import chosen, require_float32, settings
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.explain.driver import explain_sentences
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.report.content import Words
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, hash_file

CAPTIONS = 64  # explained in one pass
TEXTS = 256  # encoded at a time


@dataclass(frozen=True)
class TextFaithfulnessEvaluator:
    """Areas of deletion and insertion curves over the words of captions, by recall@1.

    At each step all captions of an image are changed, those of other images stay: text to image
    asks for the image by its changed caption, image to text for one of its changed captions. Only
    what has a letter or a digit is a word: other marks stay in deletion and do not enter in
    insertion. Deletion leaves one word; a caption that has no more words keeps its last state.

    Attributes:
        captions: Whether the first caption of an image counts, or all of them.
        steps: Words that are deleted or inserted, one at each step.
    """

    name: str
    data: Source[ImageSet]
    explainers: Mapping[str, Explainer]
    methods: Sequence[str] | None = None
    captions: Literal["first", "all"] = "all"
    steps: int = 5
    batch_size: int = 64
    text_batch_size: int = 256
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "faithfulness of text maps",
            "captions_changed": self.captions,
            "steps": self.steps,
            "words": "without marks of punctuation; deletion leaves one",
            "gallery": "captions of other images unchanged",
            "methods": settings(chosen(self.explainers, self.methods)),
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        pairs, sentences, images, texts, owner = explained(self, loaded, track)
        methods = list(sentences[0].values)
        with evaluating(loaded.clip):
            curves = {
                method: self._curves(loaded, method, sentences, images, texts, owner)
                for method in track(methods, f"{self.name}: methods", len(methods))
            }
        metrics, details = summarise(curves, "mean")
        short = sum(len(_words(one)) <= self.steps for one in sentences)
        return Measured(
            metrics=metrics,
            protocol={**self.protocol, "context_length": loaded.tokenizer.context_length},
            data=data_fingerprint(pairs.files, pairs.listed, pairs.counts),
            details={
                "captions": len(sentences),
                "captions_with_fewer_words_than_steps_and_one": short,
                "captions_without_words": sum(not _words(one) for one in sentences),
                "captions_without_relevance": {
                    method: sum(not any(one.values[method]) for one in sentences)
                    for method in methods
                },
                "captions_cut_by_the_context": sum(bool(one.cut) for one in sentences),
                "left_out": sorted(set(chosen(self.explainers, self.methods)) - set(methods)),
                "images": list(pairs.names),
                **details,
            },
        )

    def _curves(
        self,
        loaded: LoadedClip,
        method: str,
        sentences: Sequence[Words],
        images: Tensor,
        texts: Tensor,
        owner: Tensor,
    ) -> dict[str, np.ndarray]:
        """Hits by column, (B, steps); of an image with several captions their mean."""
        changed = {
            kind: [shortened(one, one.values[method], kind, self.steps) for one in sentences]
            for kind in (DELETION, INSERTION)
        }
        every = sorted({text for some in changed.values() for steps in some for text in steps})
        found = loaded.encode_texts(every, batch_size=self.text_batch_size).to(images.device)
        row = {text: number for number, text in enumerate(every)}
        columns: dict[str, list[np.ndarray]] = defaultdict(list)
        for kind, some in changed.items():
            for step in range(self.steps):
                own = found[[row[steps[step]] for steps in some]]
                image, text = changed_ranks(own, images, texts, owner)
                hits = (image < 1).double().cpu().numpy()
                place = owner.cpu().numpy()
                by_image = np.bincount(place, hits) / np.bincount(place)
                columns[f"{kind}_image@1"].append(by_image)
                columns[f"{kind}_text@1"].append((text < 1).double().cpu().numpy())
        return {name: np.stack(values, 1) for name, values in columns.items()}


@dataclass(frozen=True)
class ConcretenessEvaluator:
    """Do concrete words matter more? Linear regression of importance on ratings, over words.

    The importance of a word in a caption is its share over the largest one of the caption; of a
    word its mean over captions. Beside it the same on the logarithm of the word's frequency in the
    captions.

    Attributes:
        ratings: CSV with a word and its rating in each row, such as Brysbaert et al., 2014,
            "Concreteness ratings for 40 thousand generally known English word lemmas".
        word_column: Of the table.
        rating_column: Of the table.
        captions: Whether the first caption of an image counts, or all of them.
        frequent: Number of the most frequent words that count.
    """

    name: str
    data: Source[ImageSet]
    explainers: Mapping[str, Explainer]
    ratings: str
    word_column: str = "Word"
    rating_column: str = "Conc.M"
    methods: Sequence[str] | None = None
    captions: Literal["first", "all"] = "all"
    frequent: int = 1000
    batch_size: int = 64
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "importance of words and their concreteness",
            "captions_read": self.captions,
            "frequent": self.frequent,
            "methods": settings(chosen(self.explainers, self.methods)),
            **self.data.protocol,
        }

    def prepare(self) -> None:
        """Make or check the data and the ratings."""
        self.data.prepare()
        self._rated()

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        rated = self._rated()
        pairs, sentences, *_ = explained(self, loaded, track)
        counts = Counter(one.words[n].lower() for one in sentences for n in _words(one))
        listed = [word for word, _ in counts.most_common(self.frequent)]
        found = {word: lemma for word in listed if (lemma := lemma_in(word, rated)) is not None}
        if len(found) < 3:
            raise ValueError(
                f"{self.name}: {len(found)} of {len(listed)} frequent words have a rating in "
                f"{self.ratings}; a regression needs 3"
            )
        metrics: dict[str, float] = {}
        details: dict[str, Json] = {}
        for method in sentences[0].values:
            importance = importance_of_words(sentences, method)
            kept = [word for word in found if word in importance]
            mean = [importance[word] for word in kept]
            regressions = {
                "concreteness": [rated[found[word]] for word in kept],
                "frequency": [float(np.log(counts[word])) for word in kept],
            }
            told: dict[str, Json] = {"words": {w: round(importance[w], 4) for w in kept}}
            for name, values in regressions.items():
                fit = stats.linregress(values, mean)
                metrics[f"{method}/{name}_r2"] = float(fit.rvalue) ** 2
                told[name] = {"slope": float(fit.slope), "p": float(fit.pvalue)}
            details[method] = told
        return Measured(
            metrics=metrics,
            protocol={
                **self.protocol,
                "ratings_hash": hash_file(Path(self.ratings)),
                "context_length": loaded.tokenizer.context_length,
            },
            data=data_fingerprint(pairs.files, pairs.listed, pairs.counts),
            details={
                "frequent_words": len(listed),
                "rated_words": len(found),
                "ratings": {word: rated[lemma] for word, lemma in found.items()},
                "regressions": details,
            },
        )

    def _rated(self) -> dict[str, float]:
        path = Path(self.ratings)
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.name}: no ratings {path}; fetch those of Brysbaert et al. (2014, "
                "crr.ugent.be/archives/1330) as CSV, or name another table as ratings="
            )
        text = path.read_text("utf-8-sig")
        first = text.partition("\n")[0]
        rows = csv.DictReader(io.StringIO(text), delimiter="\t" if "\t" in first else ",")
        wanted = (self.word_column, self.rating_column)
        if missing := [name for name in wanted if name not in (rows.fieldnames or ())]:
            raise ValueError(
                f"{path} has the columns {', '.join(rows.fieldnames or ())} and no "
                f"{', '.join(missing)}; set word_column= and rating_column="
            )
        return {row[wanted[0]].strip().lower(): float(row[wanted[1]]) for row in rows}


def importance_of_words(sentences: Sequence[Words], method: str) -> dict[str, float]:
    """Mean over captions of a word's share over the largest one; captions of zeros do not count."""
    listed: dict[str, list[float]] = defaultdict(list)
    for one in sentences:
        largest = max(one.values[method], default=0.0)
        for place in _words(one) if largest else ():
            listed[one.words[place].lower()].append(one.values[method][place] / largest)
    return {word: float(np.mean(values)) for word, values in listed.items()}


def lemma_in(word: str, rated: Mapping[str, float]) -> str | None:
    """The word, or its form without an ending, that has a rating; None without one.

    >>> lemma_in("ponies", {"pony": 4.9}), lemma_in("running", {"run": 4.0})
    ('pony', 'run')
    """

    def forms() -> Iterator[str]:
        yield word
        for ending, put in (("ies", "y"), ("es", ""), ("s", ""), ("ing", ""), ("ing", "e"),
                            ("ed", ""), ("ed", "e")):  # fmt: skip
            if word.endswith(ending) and len(word) > len(ending) + 2:
                stem = word.removesuffix(ending)
                yield stem + put
                if stem[-1] == stem[-2]:
                    yield stem[:-1]

    return next((form for form in forms() if form in rated), None)


def explained(
    evaluator: TextFaithfulnessEvaluator | ConcretenessEvaluator, loaded: LoadedClip, track: Track
) -> tuple[ImageSet, list[Words], Tensor, Tensor, Tensor]:
    """The data, the words of every caption with their shares, and `encode_pairs` of them.

    Raises:
        ValueError: No method can read the words of this model.
    """
    require_float32(loaded.clip, evaluator.name)
    pairs = evaluator.data()
    images, texts, owner = encode_pairs(
        loaded, pairs, evaluator.batch_size, TEXTS, evaluator.workers, track, evaluator.name
    )
    listed = [text for some in pairs.captions for text in some]
    if evaluator.captions == "first":
        first = torch.tensor([0, *np.cumsum([len(some) for some in pairs.captions])[:-1]])
        texts, owner = texts[first], owner[first]
        listed = [some[0] for some in pairs.captions]
    methods = chosen(evaluator.explainers, evaluator.methods)
    sentences: list[Words] = []
    starts = range(0, len(listed), CAPTIONS)
    with evaluating(loaded.clip):
        for start in track(starts, f"{evaluator.name}: words", len(starts)):
            some = listed[start : start + CAPTIONS]
            target = images[owner[start : start + CAPTIONS]]
            sentences += explain_sentences(loaded, some, target, methods, skip=True)
            methods = {name: methods[name] for name in sentences[-1].values}  # warned of once
            if not methods:
                raise ValueError(f"{evaluator.name}: no method reads the words of {loaded.name}")
    return pairs, sentences, images, texts, owner


def shortened(words: Words, values: Sequence[float], kind: str, steps: int) -> list[str]:
    """The caption after each step of deletion or of insertion."""
    places = _words(words)
    order = sorted(places, key=lambda place: -values[place])  # stable: of equal ones the first
    found = []
    for step in range(1, steps + 1):
        if kind == DELETION:
            gone = set(order[: min(step, len(order) - 1)] if order else ())
            kept = [place for place in range(len(words.words)) if place not in gone]
        else:
            kept = sorted(order[:step])
        found.append(" ".join(words.words[place] for place in kept))
    return found


def _words(words: Words) -> list[int]:
    """Places of what has a letter or a digit."""
    return [n for n, word in enumerate(words.words) if any(letter.isalnum() for letter in word)]


def changed_ranks(
    own: Float[Tensor, "T D"],
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "T D"],
    owner: Int[Tensor, " T"],
    chunk: int = 512,
) -> tuple[Int[Tensor, " T"], Int[Tensor, " B"]]:
    """Wrong items before the right one: images for each changed caption, captions for each image.

    An image meets its own captions changed and those of the others as they were; of equal scores
    the right one comes last.
    """
    own, number = unit(own), torch.arange(len(images), device=images.device)
    ranks = []
    for part in torch.split(torch.arange(len(own), device=own.device), chunk):
        score = own[part] @ images.T  # (t, B)
        right = score.gather(1, owner[part].unsqueeze(1))
        wrong = owner[part].unsqueeze(1) != number
        ranks.append(((score >= right) & wrong).sum(1))
    best = images.new_full((len(images),), -torch.inf)
    best.scatter_reduce_(0, owner, (own * images[owner]).sum(1), "amax")
    before = []
    for part in torch.split(number, chunk):
        others = (images[part] @ texts.T).masked_fill(part.unsqueeze(1) == owner, -torch.inf)
        before.append((others >= best[part].unsqueeze(1)).sum(1))
    return torch.cat(ranks), torch.cat(before)
