"""Metrics of language models: of the tokens that they were to write, and of the texts that they do
write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from grape_ray.models.extras import needed

_BY = "task.evaluate_generations"
_OTHERWISE = "set task.evaluate_generations=0"


def token_metrics(batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean cross-entropy a learned token, in nats, and its exponential.

    Args:
        batches: of each batch the losses (B, K) of its tokens, 0 where nothing is learned, and
            which are learned (B, K).
    """
    total, count = 0.0, 0
    for losses, learned in batches:
        total, count = total + float(losses.double().sum()), count + int(learned.sum())
    loss = total / max(count, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}


def by_source(sources: Sequence[bytes], limit: int) -> list[list[int]]:
    """The first `limit` different sources: of each the indices of its records, which differ in
    their references.
    """
    found: dict[bytes, list[int]] = {}
    for index, source in enumerate(sources):
        if source in found or len(found) < limit:
            found.setdefault(source, []).append(index)
    return list(found.values())


def generation_metrics(
    texts: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """BLEU of a corpus (Papineni et al. 2002, as sacrebleu computes it) and mean ROUGE-L (F1; Lin
    2004, with stemming, of the best reference), both from 0 to 100.

    Args:
        texts: what was written. references: for each of them, what it may be, once or more.

    Raises:
        ConfigError: a library is not installed.

    >>> found = generation_metrics(["rain falls on the stone"], [["rain falls on the stone", "x"]])
    >>> {name: round(value, 1) for name, value in found.items()}
    {'bleu': 100.0, 'rouge_l': 100.0}
    """
    sacrebleu = needed("sacrebleu", _BY, "metrics", _OTHERWISE)
    rouge = needed("rouge_score.rouge_scorer", _BY, "metrics", _OTHERWISE)
    most = max(map(len, references))
    # one list a place among the references; None where a text has fewer
    columns = [[r[place] if place < len(r) else None for r in references] for place in range(most)]
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score_multi(list(r), text)["rougeL"].fmeasure for r, text in zip(references, texts)
    ]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(texts), columns).score),
        "rouge_l": 100 * sum(scores) / len(scores),
    }
