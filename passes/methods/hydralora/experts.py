"""How many experts HydraLoRA should have, from the training texts (arXiv 2404.19245, section 3.2.1).

The texts' TF-IDF features are clustered by k-means; the number of clusters at the elbow of the summed squared errors
is the number of experts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from ....rewriter.errors import FxgraftError, SpecError


def elbow(errors: Sequence[float]) -> int:
    """The elbow of a falling curve, `errors[i]` belonging to `i + 1` clusters: a number from 1 to `len(errors)`.

    Both axes are scaled to [0, 1] and the chord is drawn from the first point to the last; the elbow is the point
    furthest below it, the first of equals. A curve that lies nowhere below its chord has no elbow: the answer is 1.
    """
    first, last = errors[0], errors[-1]
    if len(errors) < 3 or not first > last:
        return 1
    steps = len(errors) - 1
    below = [1 - i / steps - (e - last) / (first - last) for i, e in enumerate(errors)]
    best = max(range(len(below)), key=lambda i: below[i])
    return best + 1 if below[best] > 1e-9 else 1


def suggest_experts(
    texts: Sequence[str], max_experts: int = 8, *, seed: int = 0, max_texts: int = 20_000, restarts: int = 5
) -> int:
    """A number of experts for `HydraLoRA(experts=...)`, from 1 to `max_experts`.

    The elbow rule: k-means of the TF-IDF features for k = 1 to `max_experts + 1` gives a curve of summed squared
    errors; with both axes scaled to [0, 1], the answer is the k furthest below the straight line between the curve's
    ends. One k more than may be answered is fitted, because the end of a curve can never be its elbow. An answer of 1
    says that the texts show no clusters: use plain LoRA. The paper finds results insensitive between 2 and 4.

    Args:
        texts: the training texts, at least 3 different ones.
        max_experts: the largest answer, from 2 up.
        seed: of the sample and of k-means; the same seed gives the same answer.
        max_texts: of more texts than this, a random sample is used.
        restarts: of k-means for each k; the best one counts.

    Raises:
        SpecError: unusable texts, or a number outside its range.
        FxgraftError: scikit-learn is not installed.
    """
    for name, value, least in (("max_experts", max_experts, 2), ("max_texts", max_texts, 3), ("restarts", restarts, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpecError(f"suggest_experts({name}={value!r}): allowed are whole numbers from {least} up")
    if isinstance(texts, (str, bytes)):
        raise SpecError("suggest_experts(texts): give a list of texts, not one text")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise SpecError(f"suggest_experts(texts): text {index} is {type(text).__name__}, not str")
    if len(texts) > max_texts:
        texts = random.Random(seed).sample(texts, max_texts)
    different = len(set(texts))
    if different < 3:
        raise SpecError(f"suggest_experts(texts): only {different} different text(s); an elbow needs at least 3")
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise FxgraftError("suggest_experts needs scikit-learn: pip install scikit-learn") from error
    try:
        features = TfidfVectorizer(max_features=10_000, sublinear_tf=True).fit_transform(texts)
    except ValueError as error:
        raise SpecError(f"suggest_experts(texts): the texts have no words to compare ({error})") from error
    # different texts may have equal features; k-means cannot make more clusters than there are different rows
    starts, columns, values = features.indptr, features.indices, features.data
    spans = [slice(a, b) for a, b in pairwise(starts)]
    rows = len({(columns[span].tobytes(), values[span].tobytes()) for span in spans})
    errors = [
        float(KMeans(k, n_init=restarts, random_state=seed).fit(features).inertia_)
        for k in range(1, min(max_experts + 1, rows) + 1)
    ]
    return elbow(errors)
