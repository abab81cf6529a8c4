"""
Grounding: does what a model says come from its input? Measures of losses and of texts, without a judge and without a
truth but the held-out texts themselves.

A loss that the right image lowers proves little: an image that breaks the text costs nats too. So: what share of the
loss of another input the right one removes; whether the likelihoods find the right one among 32; whether predictions
differ from item to item, and have more words of their own truth than of another's.
"""
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

SET_SIZE = 32                  # items told apart at a time; a guess is right in one of 32


class Estimate(NamedTuple):
    """A measure over n items with its 95 % interval; NaN where there was nothing to measure."""
    value: float
    low: float
    high: float
    n: int


def estimate(statistic, n, n_bootstrap=2000):
    """Estimate of statistic(picks), picks (..., n): indices of the items that it is to be worked out over.

    The interval is a bootstrap: the items are drawn again with replacement, seeded: same items, same verdict.
    """
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    picks = np.random.default_rng(0).integers(n, size=(n_bootstrap, n))
    low, high = np.quantile(statistic(picks), [0.025, 0.975])
    return Estimate(float(statistic(np.arange(n))), float(low), float(high), n)


def share_removed(correct, other):
    """Estimate of the share of the loss under another input that the right input removes, 0 to 1.

    correct, other: summed loss of each item's labels, (items,): a long item counts as much as it has labels.
    """
    correct = np.asarray(correct, np.float64)
    other = np.asarray(other, np.float64)
    return estimate(lambda picks: 1 - correct[picks].sum(-1) / other[picks].sum(-1), len(correct))


# -----------------------------------------------------------------------------
# retrieval by likelihood


def matching_sets(keys, n_items, seed, size=SET_SIZE, kinds=None):
    """About n_items items to tell apart, a list of their indices for each set of `size`.

    keys: [(input, output)] of all items. No two of a set share an input or an output: nobody could tell them apart.
    Where too few differ for sets of that size, the sets are smaller. kinds: of each item, where inputs of one kind
    alone can take each other's place; the commonest kind comes first, and each gets its share of the sets.
    """
    order = np.random.default_rng(seed).permutation(len(keys)).tolist()
    members_of = {}
    for i in order:
        members_of.setdefault(kinds[i] if kinds else None, []).append(i)
    found = []
    for members in sorted(members_of.values(), key=len, reverse=True):
        if not found:
            [different] = fill_sets(keys, members, n_sets=1, size=len(keys))
            size = max(1, min(size, len(different)))
        share = len(members) / len(keys)
        n_sets = round(share * min(n_items, len(keys))) // size
        sets = fill_sets(keys, members, n_sets=n_sets if found else max(1, n_sets), size=size)
        found += [chosen for chosen in sets if len(chosen) == size]
    return found


def fill_sets(keys, order, n_sets, size):
    """Each item in turn goes to the first set that has room and nothing of its keys."""
    sets = [[] for _ in range(n_sets)]
    taken = [set() for _ in sets]
    for i in order:
        marked = {('input', keys[i][0]), ('output', keys[i][1])}
        for members, seen in zip(sets, taken):
            if len(members) < size and not marked & seen:
                members.append(i)
                seen |= marked
                break
    return sets


def crossed_share(crossed):
    """share_removed of crossed losses: each output behind its own input, against its mean behind the others."""
    own = np.diagonal(crossed, axis1=1, axis2=2)                                                # (sets, n)
    others = (crossed.sum(1) - own) / max(crossed.shape[1] - 1, 1)
    return share_removed(own.ravel(), others.ravel())


def input_ranks(crossed):
    """The rank of the right input of each output, 1 the best, (sets, n).

    crossed: (sets, n, n), [s, i, j] the loss of output j given input i. An input as likely as the right one stands
    before it: a model that looks at none of them comes last.
    """
    own = np.diagonal(crossed, axis1=1, axis2=2)                                                # (sets, n)
    n_worse = (crossed > own[:, None, :]).sum(1)       # NaN is worse than nothing, and has no worse
    return crossed.shape[1] - n_worse


def output_ranks(crossed):
    """The rank of the right output of each input, (sets, n). Each output's loss is taken less its mean over all inputs:
    a likely sentence is not a right one."""
    surplus = crossed - crossed.mean(1, keepdims=True)
    own = np.diagonal(surplus, axis1=1, axis2=2)                                                # (sets, n)
    n_worse = (surplus > own[:, :, None]).sum(2)
    return crossed.shape[1] - n_worse


def recall(ranks, k=1):
    """Estimate of the share of ranks that are k or better."""
    found = np.asarray(ranks).ravel() <= k
    return estimate(lambda picks: found[picks].mean(-1), found.size)


def retrieval(crossed):
    """What the log keeps of crossed losses: recall@1 and @5 and the median rank, of inputs and of outputs."""
    crossed = np.asarray(crossed, np.float64)
    measured = {}
    for name, ranks in ('input', input_ranks(crossed)), ('output', output_ranks(crossed)):
        measured[f'{name}_recall_1'] = recall(ranks).value
        measured[f'{name}_recall_5'] = recall(ranks, 5).value
        measured[f'{name}_median_rank'] = float(np.median(ranks))
    return measured


# -----------------------------------------------------------------------------
# texts


class Prediction(NamedTuple):
    """A text that a model made, beside the held-out one."""
    truth: str
    text: str
    is_cut: bool                       # it reached the limit of new tokens
    truth_is_cut: bool                 # the truth would have
    question: str = ''


def words_of(text):
    """Lower-case words; of scripts without spaces, characters."""
    return re.findall(r'[\u0e00-\u0eff\u3040-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u9fff]+', text.lower())


def ngrams(words, n):
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def stammers(text):
    """Does it say two or more words twice in a row, "a picture of a picture of a mouse"?"""
    words = words_of(text)
    for n in range(2, len(words) // 2 + 1):
        for i in range(len(words) - 2 * n + 1):
            if words[i:i + n] == words[i + n:i + 2 * n]:
                return True
    return False


def text_shares(texts, cut):
    """Of texts: the share of different ones, of the commonest one, of those that stammer, that are empty, that are cut.
    cut: for each whether it is."""
    n = len(texts)
    if n == 0:
        return dict.fromkeys(('distinct', 'commonest', 'stammering', 'empty', 'cut'), math.nan)
    counts = Counter(' '.join(text.lower().split()) for text in texts)
    return {
        'distinct': len(counts) / n,
        'commonest': max(counts.values()) / n,
        'stammering': sum(map(stammers, texts)) / n,
        'empty': sum(not text.strip() for text in texts) / n,
        'cut': sum(cut) / n,
    }


def distinct(outputs):
    """The share of different ones among texts, or lists of ids."""
    return len({str(output) for output in outputs}) / len(outputs) if outputs else math.nan


def prediction_shares(predictions):
    """(text_shares of predictions, of the truths)."""
    return (text_shares([p.text for p in predictions], [p.is_cut for p in predictions]),
            text_shares([p.truth for p in predictions], [p.truth_is_cut for p in predictions]))


def own_truth(predictions):
    """Estimate of how many more words a text shares with its own truth than with others', as a difference of F1.

    Others: the truths that are different, of the same question where it was asked more than once: that a colour was
    asked for is in the question, which colour is in the picture.
    """
    index = {}
    rows = {'text': [], 'truth': []}
    for kind, sets in rows.items():
        for p in predictions:
            sets.append([index.setdefault(word, len(index)) for word in set(words_of(getattr(p, kind)))])
    shape = (len(predictions), max(len(index), 1))
    has = {kind: np.zeros(shape, np.float32) for kind in rows}                                  # (items, words) each
    for kind, sets in rows.items():
        for row, found in zip(has[kind], sets):
            row[found] = 1
    sizes = has['text'].sum(1)[:, None] + has['truth'].sum(1)
    f1 = 2 * has['text'] @ has['truth'].T / np.maximum(sizes, 1)       # (items, items): text i, truth j
    truths = np.array([p.truth for p in predictions])
    questions = np.array([p.question for p in predictions])
    others = truths[:, None] != truths                                                          # (items, items)
    asked_too = others & (questions[:, None] == questions)
    others = np.where(asked_too.any(1, keepdims=True), asked_too, others)
    kept = others.any(1)                               # where all truths are one, there is nothing to compare
    other_f1 = (f1 * others).sum(1)[kept] / others.sum(1)[kept]
    surplus = np.diagonal(f1)[kept] - other_f1
    return estimate(lambda picks: surplus[picks].mean(-1), len(surplus))


def shared_phrases(texts, others, n=5):
    """The share of the phrases of n words in some texts that are in others too; NaN where they have none."""
    known = set()
    for text in others:
        known.update(ngrams(words_of(text), n))
    found = []
    for text in texts:
        found += [phrase in known for phrase in ngrams(words_of(text), n)]
    return sum(found) / len(found) if found else math.nan
