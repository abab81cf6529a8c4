"""
What evaluations cost in a run of the real configs, by multiplications and by the bytes that generation reads: nothing
is loaded. The table of docs/bigger.md.

reads   configs/{a1,a2,b3,b4}_qwen3_{0.6b,8b}.py: how many held-out items, golden ones, conditions
writes  the table: a step, an evaluation in steps, how often it comes by default, its share of the time
done    at once

$ python -m tools.eval_cost
$ python -m tools.eval_cost --tflops=150 --tb_per_s=0.9 --cards=(1,)

Counted: the products of the language model, its head and the tower; for generation the weights and the cache, which
every new token reads. Not counted: the connector, LoRA, attention's scores, the codecs, the disk and the time from one
kernel to the next, which generation has most of: a run measures its own.
"""
import math
from typing import NamedTuple

from configure import configure
from tools.check import PICTURE_CODES, REPO, SOUND_CODES, read_settings
from tools.memory import KNOWN
from uti import TASKS

LABELS = {'a1': 18, 'a2': 150}                         # of an example: means of tools/synthetic.py's lists
PROMPT = {'a1': 1, 'a2': 60}                           # its other tokens, without the image
TEXT = 20                                              # tokens of a caption in Track B
PLAIN_TEXT = 60                                        # of a line of text_jsonl
ANSWERS = {'a1': 1, 'a2': 2}                           # of a sample
SET = 32                                               # items told apart at a time
HOURS = 1, 10                                          # of a run
BEFORE = 200                                           # steps between two evaluations, once a constant


class Example(NamedTuple):
    """Means of what a step has."""
    tokens: float
    labels: float                      # text to predict
    codes: float = 0                   # codes to predict
    images: int = 0                    # that the tower sees


class Card(NamedTuple):
    """One GPU and what runs on it."""
    llm: dict                          # of KNOWN
    flops: float                       # multiplications and additions in a second
    bandwidth: float                   # bytes in a second

    def layer_weights(self):
        shape = self.llm
        d = shape['hidden_size']
        inside = shape['num_attention_heads'] * shape['head_dim']
        keys = shape['num_key_value_heads'] * shape['head_dim']
        return shape['num_hidden_layers'] * (2 * d * inside + 2 * d * keys + 3 * d * shape['intermediate_size'])

    def forward(self, example):
        """Seconds of one example without a gradient, its image tokens there."""
        head = example.labels * self.llm['vocab_size'] + example.codes * CODE_RANGE
        return 2 * (self.layer_weights() * example.tokens + self.llm['hidden_size'] * head) / self.flops

    def look(self):
        """Seconds of one picture in the tower."""
        shape = KNOWN['google/siglip2-so400m-patch14-384']
        width = shape['hidden_size']
        weights = shape['num_hidden_layers'] * (4 * width ** 2 + 2 * width * shape['intermediate_size'])
        return 2 * weights * (shape['image_size'] // shape['patch_size']) ** 2 / self.flops

    def train(self, example):
        """Seconds of one example with its backward pass: as many products, since frozen weights have no gradient."""
        return 2 * self.forward(example) + example.images * self.look()

    def generate(self, n, prompt, n_new, head, batch):
        """Seconds of n continuations by n_new tokens, a batch at a time. head: ids to choose from."""
        shape = self.llm
        weights = self.layer_weights() + head * shape['hidden_size']
        cache = 4 * shape['num_hidden_layers'] * shape['num_key_value_heads'] * shape['head_dim']   # bytes of a token
        seconds = n * 2 * self.layer_weights() * prompt / self.flops
        while n > 0:
            part = min(n, batch)
            read = 2 * weights + part * cache * (prompt + n_new / 2)
            seconds += n_new * max(2 * part * weights / self.flops, read / self.bandwidth)
            n -= part
        return seconds


CODE_RANGE = PICTURE_CODES['deepseek-community/Janus-Pro-1B'][1]
N_CODES = {'image': PICTURE_CODES['deepseek-community/Janus-Pro-1B'][0],
           'audio': round(10 * SOUND_CODES['kyutai/mimi'][0]) * 8}     # ten seconds, eight codebooks


def vision_example(stage, settings):
    n = LABELS[stage]
    return Example(settings['num_image_tokens'] + 2 + PROMPT[stage] + n, n, images=1)


def token_example(task):
    modality, direction = TASKS[task]
    n = N_CODES[modality]
    return Example(n + TEXT + 2, TEXT, 0) if direction == 'read' else Example(n + TEXT + 2, 1, n)


def step_seconds(stage, settings, card, ranks):
    """A training step: its examples in the shares of the tasks, in equal parts on every card."""
    if stage in ('a1', 'a2'):
        mean = card.train(vision_example(stage, settings))
    else:
        weights = settings['task_weights']
        mean = sum(w * card.train(token_example(task)) for task, w in weights.items()) / sum(weights.values())
    replayed = settings['replay_share'] if settings.get('replay_jsonl') else 0
    mean = (1 - replayed) * mean + replayed * card.train(Example(PLAIN_TEXT, PLAIN_TEXT))
    return settings['global_batch_size'] * mean / ranks


def vision_evaluation(stage, settings, card, ranks, at_end):
    """Held-out loss under four kinds of images, pictures told apart, answers generated; and plain text in A2."""
    def share(n):
        return math.ceil(n / ranks)

    example = vision_example(stage, settings)
    n_sets = settings['n_retrieval'] // SET if at_end else 1
    seconds = share(settings['n_eval']) * (card.look() + 4 * card.forward(example))
    seconds += n_sets * (SET * card.look() + share(SET ** 2) * card.forward(example))
    n = settings['n_golden'] + settings['n_predictions'] if at_end else settings['n_golden_between']
    prompt = example.tokens - LABELS[stage]
    seconds += share(n) * card.look()
    seconds += card.generate(share(n * ANSWERS[stage]), prompt, settings['max_new_tokens'],
                             card.llm['vocab_size'], 4 * settings['micro_batch_size'])
    if stage == 'a2':
        n_times = 2 if at_end else 1                   # and of the model without its adapter
        seconds += n_times * share(settings['n_text']) * card.forward(Example(PLAIN_TEXT, PLAIN_TEXT))
    return seconds


def token_evaluation(stage, settings, card, ranks, at_end):
    """Of each task: held-out loss as it is and under two other conditions, items told apart, golden ones generated."""
    def share(n):
        return math.ceil(n / ranks)

    guidance = settings['guidance'] if isinstance(settings['guidance'], tuple) else (settings['guidance'],)
    n_sets = settings['n_retrieval'] // SET if at_end else 1
    n_golden = settings['n_golden'] if at_end else settings['n_golden_between']
    n_predictions = settings.get('n_predictions', 0) if at_end else 0
    seconds = 0.0
    for task in settings['task_weights']:
        example = token_example(task)
        modality, direction = TASKS[task]
        n_conditions = 3 if stage == 'b4' or direction == 'read' else 1
        seconds += (n_conditions * share(settings['n_eval']) + n_sets * share(SET ** 2)) * card.forward(example)
        batch = 4 * settings['micro_batch_size']
        if direction == 'read':
            seconds += card.generate(share(n_golden + n_predictions), N_CODES[modality] + 2,
                                     settings['max_new_tokens'], card.llm['vocab_size'], batch)
            continue
        for n, values in (n_golden, guidance[:1]), (n_predictions, guidance):
            for value in values:
                n_rows = 2 if value != 1 else 1        # the same without its prompt beside it
                seconds += card.generate(share(n) * n_rows, TEXT, N_CODES[modality], CODE_RANGE, batch * n_rows)
    if stage == 'b4':
        seconds += share(settings['n_text']) * card.forward(Example(PLAIN_TEXT, PLAIN_TEXT))
    return seconds


def percent(share):
    return f'{100 * share:.1f} %'


def row(stage, size, card, ranks):
    """The cells of a line."""
    settings, _ = read_settings(stage, REPO / f'configs/{stage}_qwen3_{size}.py')
    if stage == 'a2':                                  # A1's, which it starts from
        settings['num_image_tokens'] = 64
    evaluation = vision_evaluation if stage in ('a1', 'a2') else token_evaluation
    step = step_seconds(stage, settings, card, ranks)
    between = evaluation(stage, settings, card, ranks, False)
    at_end = evaluation(stage, settings, card, ranks, True)
    wanted = settings['eval_time_share']
    eval_every = max(1, math.ceil(between * (1 - wanted) / (wanted * step)))
    cells = [stage.upper(), f'{size.upper()} on {ranks}', f'{step:.3g} s', f'{between / step:.0f}',
             f'{at_end / step:.0f}', percent(between / (between + BEFORE * step)), f'{eval_every}']
    for hours in HOURS:
        n_steps = (3600 * hours - between) / (step + between / eval_every)     # as measure_epoch has it
        n_between = max(0, math.ceil(n_steps / eval_every) - 1)
        seconds = (1 + n_between) * between + at_end
        cells.append(percent(seconds / (seconds + n_steps * step)))
    return cells


HEAD = ['stage', 'base, cards', 'a step', 'an evaluation, in steps', 'the last one',
        f'share at {BEFORE} steps', 'steps between by default', *(f'share of a run of {hours} h' for hours in HOURS)]


def table(tflops, tb_per_s, cards):
    lines = [HEAD, ['---'] * len(HEAD)]
    for size, name in ('0.6b', 'Qwen/Qwen3-0.6B'), ('8b', 'Qwen/Qwen3-8B'):
        for stage in 'a1', 'a2', 'b3', 'b4':
            for ranks in cards:
                lines.append(row(stage, size, Card(KNOWN[name], tflops * 1e12, tb_per_s * 1e12), ranks))
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # settings; override any with --key=value
    tflops = 400.0                 # what a card multiplies in bfloat16, 10^12 a second: four tenths of an H100's peak
    tb_per_s = 3.0                 # what it reads of its memory
    cards = (1, 8)
    config = configure(globals())
    # -----------------------------------------------------------------------------
    print(table(tflops, tb_per_s, cards))
