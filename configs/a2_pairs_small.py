# The small world's A2 goes on: questions about two pictures, beside some about one so that those are not forgotten.
# $ python train_a2.py configs/a2_pairs_small.py
# 9 CPU minutes. 95 % of 457 answers about two pictures are right: all 231 of which has more and as many, 38 of
# 61 of the same colour; about one picture 91 % of 45 (docs/results.md, Two pictures). Not a part of `make small`.
from small.make import ensure

_small = ensure('pairs', 'text')
data_json = f'{_small}/pairs/data.json'
image_root = f'{_small}/pairs/images'
align_dir = 'out/a1_small'
init_from = 'out/a2_small'     # verdicts (so yes, so the first) are hardly learned where all is learned at once
text_jsonl = f'{_small}/text/eval.jsonl'
replay_jsonl = f'{_small}/text/replay.jsonl'
replay_share = 0.1             # a third of A2's: the text has been learned, and the verdicts get more of the gradient
out_dir = 'out/a2_pairs_small'
max_seq_len = 384              # two pictures and up to five questions
micro_batch_size = 40
global_batch_size = 40         # 32 chats about two pictures, 4 about one, 4 texts
learning_rate = 1.5e-3
lora_learning_rate = 3e-3
epoch_samples = 16_000         # 400 steps
eval_every = 400
eval_first = False
n_eval = 256
n_text = 256
max_new_tokens = 48
feature_cache = f'{_small}/features'
