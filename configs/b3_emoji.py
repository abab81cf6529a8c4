# New rows for SmolLM2-135M on two CPU cores: 2,052 rows for the codes of emoji and of spoken names.
# $ python train_b3.py configs/b3_emoji.py
# Not run whole: by the cost of its steps 55 CPU minutes. 120 steps of 16, 5 CPU minutes, learn what codes are likely,
# and not yet which: text and export are exact, the gates that ask whether it looks fail (LOG.md).
shards_dir = 'out/b2_emoji'
llm = 'HuggingFaceTB/SmolLM2-135M-Instruct'
image_codec = 'data/emoji/image_codec'
audio_codec = 'data/emoji/audio_codec'
text_jsonl = 'data/emoji/text.jsonl'
out_dir = 'out/b3_emoji'
new_rows_noise = 0.02          # at 0.1, the spread of the text rows, drawing begins at 18 nats a code; a guess is 7
task_weights = {'i2t': 3.0, 'a2t': 3.0, 't2i': 1.0, 't2a': 1.0}
max_seq_len = 256
micro_batch_size = 16
global_batch_size = 32
learning_rate = 5e-3
epoch_samples = 24_000         # 750 steps
eval_every = 250
eval_first = False             # an evaluation is as long as 80 steps
n_eval = 64
n_golden = 16
n_golden_between = 4
n_retrieval = 32
n_text = 32
max_new_tokens = 16
log_every = 25
