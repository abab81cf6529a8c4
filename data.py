"""
Data: examples, held-out sets, batches.

An item is a sample as a list names it; an example is an item as token ids with its labels. Which examples a step has is
a function of (settings, step): there is no state to save, and any number of ranks sees the same ones.

Letters: B examples, T tokens of all examples together, L tokens of the longest, M labels, N image tokens, P patches.
"""
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from common import in_parts, read_sealed, sha256_file, write_sealed
from examples import HASH_DIGITS, Chosen, Examples, Pictures, image_sizes, in_hash_order, media_key
from media import BadSample

# -----------------------------------------------------------------------------
# what examples say


def plain_texts(examples):
    """The texts of ChatTemplate.text's examples."""
    return [example.item.turns[0][1] for example in examples]


def answer_starts(example):
    """Where each answer begins, [position]: the ids before it are the prompt of that answer."""
    starts = []
    previous = None
    for position in example.label_positions.tolist():
        if previous is None or position != previous + 1:   # a gap: the next question was in it
            starts.append(position)
        previous = position
    return starts


# -----------------------------------------------------------------------------
# held-out sets

N_LOOKED_AT = 64                                       # images whose bytes a resume compares: all would take too long
ANEW = 'remove the file to choose anew, and train anew'


def sample_hashes(examples, sizes=None):
    """The sample_hash of each example, in their order, as one text: where two differ is which sample differs. sizes: of
    image_sizes, where they are known."""
    return Examples.of(examples).hashes(image_sizes(examples) if sizes is None else sizes)


def data_fingerprint(examples, split_path):
    """{name: what tells it from another}, as a checkpoint keeps it, of examples and the split of them: their number,
    N_LOOKED_AT of them with the bytes of their images, and all of them as the split knows them."""
    hashes = read_split(split_path)['fingerprint']     # of these examples: choose_split has looked
    n_looked_at = min(N_LOOKED_AT, len(examples))
    found = {'the number of samples': len(examples)}
    for k in sorted(np.random.default_rng(0).choice(len(examples), n_looked_at, replace=False).tolist()):
        item = examples[k].item
        try:
            key = media_key(item)
        except BadSample:
            key = 'unreadable'
        found[f'sample {item.id!r}'] = f'{hashes[HASH_DIGITS * k:HASH_DIGITS * (k + 1)]} {key[:HASH_DIGITS]}'
    found['all samples'] = hashlib.sha256(hashes.encode()).hexdigest()[:HASH_DIGITS]
    return found


def files_fingerprint(**paths):
    """The same of files, by the names of their settings; '' is no file."""
    return {name: sha256_file(path)[:HASH_DIGITS] for name, path in paths.items() if path}


def bucket_of(n_labels, edges):
    """0 short, 1 medium, 2 long; edges: the most labels of a short and of a medium example."""
    return sum(n_labels > edge for edge in edges)


def length_buckets(counts, edges):
    """{name: mask over the examples} of the buckets that hold any, from each example's number of labels."""
    buckets = np.array([bucket_of(n, edges) for n in counts])                                   # (examples,)
    masks = {name: buckets == n for n, name in enumerate(('short', 'medium', 'long'))}
    return {name: mask for name, mask in masks.items() if mask.any()}


def label_thirds(examples):
    """The bucket edges that cut the examples into three parts of like size."""
    counts = Examples.of(examples).columns['n_labels']
    if not len(counts):
        return [0, 0]
    return [int(edge) for edge in np.quantile(counts, [1 / 3, 2 / 3], method='lower')]


def choose_split(examples, n_eval, n_golden, bucket_edges, path, bad_samples, read):
    """Write `path`, the choice of eval and golden ids and of every id held out of training, unless it is there, was
    asked for the same and is of the same data. Rank 0.

    eval and golden are balanced over the three length buckets, as far as each has so many; a picture that is in one of
    them, by its bytes, is in no other set. bucket_edges: () for label_thirds. read(path) decodes an image: a held-out
    one has to be whole.
    """
    settings = {'n_eval': n_eval, 'n_golden': n_golden, 'bucket_edges': list(bucket_edges)}
    if Path(path).exists():
        chosen = read_split(path)
        for name, had in chosen['settings'].items():
            if settings.get(name) != had:
                raise SystemExit(f'{path} was chosen with {name} = {had}, this run has {settings.get(name)}: {ANEW}')
        require_same_data(chosen, examples, path)
        return
    pictures = Pictures(examples, bad_samples)
    columns = pictures.examples.columns
    n_labels = columns['n_labels']
    eligible = (pictures.is_there & (columns['truncated'] == 0) & (n_labels > 0)
                & (pictures.examples.image_counts() > 0))
    edges = list(bucket_edges) or label_thirds(pictures.examples)
    bucket_of_each = bucket_of(n_labels, edges)
    ids = list(pictures.examples.ids())
    # a hash decides, not the list's order: adding samples moves few of the others
    order = in_hash_order(ids, np.flatnonzero(eligible), 'choice')

    def choose(n, buckets):
        """Up to n examples of some buckets, by their numbers, each with a picture of its own that is whole."""
        numbers = []
        for i in order[np.isin(bucket_of_each[order], buckets)].tolist():
            if len(numbers) == n:
                break
            if pictures.take(i, read):
                numbers.append(i)
        return numbers

    chosen = {'settings': settings, 'edges': edges}
    for name, n in ('golden', n_golden), ('eval', n_eval):
        third = n // 3
        numbers = []
        for bucket, share in enumerate((third, third, n - 2 * third)):
            numbers += choose(share, [bucket])
        numbers += choose(n - len(numbers), [0, 1, 2])         # for what a bucket had too few of
        # in the order of another hash, so that any part of the set is a fair one
        chosen[name] = [ids[i] for i in in_hash_order(ids, numbers, 'order')]
    chosen['held_out'] = [ids[i] for i in pictures.held_out()]
    chosen['media_sha256'] = {ids[i]: ' '.join(keys) for i, keys in sorted(pictures.taken.items())}
    chosen['fingerprint'] = sample_hashes(pictures.examples, pictures.sizes)
    write_sealed(path, chosen)


def read_split(path):
    return read_sealed(path, 'the training script')


def require_same_data(chosen, examples, path):
    """Exit, naming the first sample that differs, when a split was chosen from other samples than these."""
    had = chosen['fingerprint']
    examples = Examples.of(examples)
    found = sample_hashes(examples)
    if found != had:
        n = len(os.path.commonprefix([had, found])) // HASH_DIGITS     # the first sample that differs
        name = repr(examples.item(n).id) if n < len(examples) else 'which is gone'
        raise SystemExit(f'{path} was chosen from other data ({len(had) // HASH_DIGITS} samples, now {len(examples)}): '
                         f'the first that differs is number {n}, {name}; restore it, or {ANEW}')
    for i, id in enumerate(examples.ids()):
        sha256 = chosen['media_sha256'].get(id)
        if sha256 is not None and media_key(examples.item(i)) != sha256:
            images = ', '.join(examples.item(i).images)
            raise SystemExit(f'{path} was chosen from other data: {images}, the image of {id!r}, has changed; restore '
                             f'it, or {ANEW}')


def load_split(examples, path, n_eval):
    """(train, eval, golden, bucket edges) as choose_split wrote it: lists of examples; Chosen of them to train on, if
    they are Examples."""
    chosen = read_split(path)
    held_out = set(chosen['held_out'])
    places = {}                                        # {id of a held-out example: its number}
    kept = []
    ids = examples.ids() if isinstance(examples, Examples) else [example.item.id for example in examples]
    for i, id in enumerate(ids):
        if id in held_out:
            places[id] = i
        else:
            kept.append(i)
    train_set = Chosen((examples, kept)) if isinstance(examples, Examples) else [examples[i] for i in kept]
    eval_set = [examples[places[id]] for id in chosen['eval']]
    golden_set = [examples[places[id]] for id in chosen['golden']]
    if not train_set or len(eval_set) < 8:     # as many as gates.clears asks
        raise SystemExit(f'{len(examples)} samples leave {len(train_set)} to train on and {len(eval_set)} of {n_eval} '
                         'to evaluate on: add data or lower n_eval and n_golden')
    return train_set, eval_set, golden_set, chosen['edges']


# -----------------------------------------------------------------------------
# batches


class Layout(Sequence):
    """How the examples of an unpadded batch lie: [(pad_index (B, L), unpad_index (tokens,))] of its groups; and for
    attention that needs no padding the token that each example begins with, then their number, and the longest length.
    """
    def __init__(self, groups, boundaries, longest):
        self.groups = groups
        self.boundaries = boundaries                   # int32 (examples + 1,)
        self.longest = longest

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, n):
        return self.groups[n]

    def each_tensor(self, function):
        groups = [(function(pad_index), function(unpad_index)) for pad_index, unpad_index in self.groups]
        return Layout(groups, function(self.boundaries), self.longest)

    def to(self, device):
        return self.each_tensor(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass
class Batch:
    """Examples laid end to end, T tokens, with every position that the step needs found beforehand, on the host."""
    input_ids: torch.Tensor            # (T,)
    position_ids: torch.Tensor         # (T,) counted anew in each example
    layout: Layout                     # how attention lays the examples out, a group at a time: see padded_layout
    image_positions: torch.Tensor      # (images * N,)
    logit_positions: torch.Tensor      # (M,) the position before each label: its logits predict the label
    labels: torch.Tensor               # (M,)
    label_examples: torch.Tensor       # (M,) which of the B examples a label is in
    images: torch.Tensor | None        # of all examples, uint8 (images, 3, H, W) or features (images, P, Dv)
    n_labels: int
    items: list                        # of the B examples
    label_ranges: list = field(default_factory=list)   # Track B: labels stand sorted by range, [(range, how many)]

    @property
    def ids(self):
        return [item.id for item in self.items]        # looked up when a line names them: they may be on disk

    def each_tensor(self, function):
        """This batch with function(tensor) in the place of every tensor."""
        changed = {name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, layout=self.layout.each_tensor(function), **changed)

    def to(self, device):
        return self.each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self):
        """In memory that a GPU fetches by itself, while the host goes on."""
        return self.each_tensor(torch.Tensor.pin_memory)


def attention_groups(lengths, most=16, waste=1.25):
    """Cut examples, in their order, into groups that attention fills up to their longest: [number of examples].

    A group ends where its filled-up squares would pass `waste` times the real ones: attention pays for squares.
    """
    groups = []
    group = []                                         # lengths of the group so far
    for length in lengths:
        longer = [*group, length]
        filled_up = len(longer) * max(longer) ** 2
        real = sum(n ** 2 for n in longer)
        if group and (len(group) == most or filled_up > waste * real):
            groups.append(len(group))
            longer = [length]
        group = longer
    return [*groups, len(group)]


def padded_layout(lengths, groups=None):
    """The Layout of an unpadded batch of examples of these lengths. groups: by default the attention_groups.

    pad_index says which of the group's tokens stands at each place of the padded group; a short example is filled up
    with token 0, which the causal mask hides. unpad_index says where in B * L each of the group's tokens is. Two
    examples of 3 and 1 tokens: pad_index [[0, 1, 2], [3, 0, 0]], unpad_index [0, 1, 2, 3].
    Examples come in the order of their lengths, so that little is filled up.
    """
    layout = []
    first = 0
    for n in groups or attention_groups(lengths):
        group = np.array(lengths[first:first + n])
        first += n
        starts = np.cumsum(group) - group
        columns = np.arange(group.max())
        is_token = columns < group[:, None]                                                     # (B, L)
        pad_index = np.where(is_token, columns + starts[:, None], 0)                            # (B, L)
        unpad_index = np.flatnonzero(is_token)                                                  # (tokens,)
        layout.append((torch.from_numpy(pad_index), torch.from_numpy(unpad_index)))
    boundaries = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))                    # (examples + 1,)
    return Layout(layout, boundaries, max(lengths))


def collate(examples, images=None, num_image_tokens=0):
    """[Example], the arrays of each one's images or None -> Batch.

    Where examples say the ranges of their labels, the labels of all are sorted by range, so that a typed head takes one
    slice for each.
    """
    lengths = [len(example) for example in examples]
    starts = np.cumsum([0, *lengths[:-1]])
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)                # (T,)
    position_ids = np.concatenate([np.arange(n) for n in lengths])                              # (T,)
    image_positions = [np.zeros(0, np.int64)]
    label_positions = []
    for start, example in zip(starts, examples):
        label_positions.append(start + example.label_positions.astype(np.int64))
        image_positions.append((start + example.image_starts[:, None] + np.arange(num_image_tokens)).ravel())
    label_examples = np.repeat(np.arange(len(examples)), [len(positions) for positions in label_positions])
    label_positions = np.concatenate(label_positions)                                           # (M,)
    label_ranges = []
    if any(example.label_ranges is not None for example in examples):
        ranges = np.concatenate([ranges_of(example) for example in examples])
        order = np.argsort(ranges, kind='stable')      # stable: inside a range the batch's own order stays
        label_positions = label_positions[order]
        label_examples = label_examples[order]
        for label_range, count in zip(*np.unique(ranges, return_counts=True)):
            label_ranges.append((int(label_range), int(count)))
    kept_images = [image for of_example in images or [] for image in of_example]
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(position_ids),
        layout=padded_layout(lengths),
        image_positions=torch.from_numpy(np.concatenate(image_positions)),
        logit_positions=torch.from_numpy(label_positions - 1),
        labels=torch.from_numpy(ids[label_positions]),
        label_examples=torch.from_numpy(label_examples),
        images=torch.from_numpy(np.stack(kept_images)) if kept_images else None,
        n_labels=len(label_positions),
        items=[example.item for example in examples],
        label_ranges=label_ranges,
    )


def ranges_of(example):
    """The range of each of its labels; text, range 0, where it does not say."""
    if example.label_ranges is None:
        return np.zeros(len(example.label_positions), int)
    return example.label_ranges


latest_orders = {}                                     # (n, seed): (epoch, order)


def epoch_order(n, epoch, seed):
    """A permutation of n. The latest of each (n, seed) is kept: one for each task, 40 MB for ten million examples."""
    had_epoch, order = latest_orders.get((n, seed), (None, None))
    if had_epoch != epoch:
        order = np.random.default_rng([seed, epoch]).permutation(n).astype(np.int32)
        latest_orders[n, seed] = epoch, order
    return order


def shuffled_index(n, k, seed):
    """Which of n examples the k-th of the run is: a new permutation each epoch, a function of (seed, k)."""
    return int(epoch_order(n, int(k) // n, seed)[k % n])


class ShuffledSampler:
    """Which examples a global step has: all of them in a new order each epoch."""
    def __init__(self, examples, global_batch_size, seed):
        self.examples = examples
        self.global_batch_size = global_batch_size
        self.seed = seed

    def step(self, n):
        """The examples of step n, longest first: micro-batches hold ones of like length, and memory peaks at once."""
        first = n * self.global_batch_size
        chosen = []
        for k in range(first, first + self.global_batch_size):
            chosen.append(self.examples[shuffled_index(len(self.examples), k, self.seed)])
        return sorted(chosen, key=len, reverse=True)


def deal(examples, n):
    """[[Example]], n parts of a step's examples, longest first, with like numbers of tokens: each goes to the part that
    has the fewest so far. In a part they keep their order."""
    parts = [[] for _ in range(n)]
    n_tokens = [0] * n
    for example in examples:
        k = n_tokens.index(min(n_tokens))
        parts[k].append(example)
        n_tokens[k] += len(example)
    return parts


def image_reader(read, cache=None):
    """path -> array: uint8 pixels by read(path), or patch features from a cache, {path: array}."""
    def get_image(path):
        if cache is None:
            return read(path)
        if path not in cache:
            raise BadSample(f'{path}: no such image')
        return cache[path]
    return get_image


class Loader:
    """Examples -> batches. `workers` threads read images; one more stays a step ahead.

    get_image(path) -> array, raising BadSample: such an example is left out of its batch and goes to bad_samples.
    """
    def __init__(self, get_image: Callable | None = None, num_image_tokens=0, bad_samples=None, workers=2):
        self.get_image = get_image
        self.num_image_tokens = num_image_tokens
        self.bad_samples = bad_samples
        self.readers = ThreadPoolExecutor(workers)
        self.ahead = ThreadPoolExecutor(1)             # its own: waiting for `readers` in `readers` would lock up

    def images_of(self, example):
        """The array of each image of an example."""
        if not len(example.image_starts):              # of a text, or of Track B, whose items are others
            return []
        return [self.get_image(path) for path in example.item.images]

    def images_or_reason(self, example):
        """The same, or the BadSample that says why one cannot be had."""
        try:
            return self.images_of(example)
        except BadSample as e:
            return e

    def collate(self, examples):
        """[Example] -> Batch of those whose image can be read, or None."""
        kept = []
        images = []
        for example, found in zip(examples, self.readers.map(self.images_or_reason, examples)):
            if isinstance(found, BadSample):
                self.bad_samples.add(example.item.id, found)
            else:
                kept.append(example)
                images.append(found)
        return collate(kept, images, self.num_image_tokens) if kept else None

    def images(self, examples):
        """The images of examples that all have whole ones, as one tensor, (images, ...)."""
        return torch.from_numpy(np.stack(list(chain.from_iterable(self.readers.map(self.images_of, examples)))))

    def rank_batches(self, examples, micro_batch_size, rank, world_size):
        """This rank's part of a step's examples, in the order of their lengths, as micro-batches."""
        batches = []
        mine = deal(examples, world_size)[rank]
        for part in in_parts(mine, micro_batch_size):
            batch = self.collate(part)
            if batch is not None:
                # in this thread, since it takes time; where a GPU is used
                batches.append(batch.pinned() if torch.cuda.is_initialized() else batch)
        return batches

    def steps(self, sampler, first, last, micro_batch_size, rank, world_size):
        """This rank's batches of step `first`, then `first` + 1, ... `last` - 1, a list each; the next step's are made
        while this one's are used."""
        def make(step):
            return self.rank_batches(sampler.step(step), micro_batch_size, rank, world_size)

        if first >= last:
            return
        next_batches = self.ahead.submit(make, first)
        for step in range(first, last):
            batches = next_batches.result()
            if step + 1 < last:
                next_batches = self.ahead.submit(make, step + 1)
            yield batches
