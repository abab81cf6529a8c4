# Questions about real pictures to a real language model: the aligned SmolLM2-135M learns to answer about emoji.
# $ python train_a2.py configs/a2_emoji.py
# With 6,000 chats 38 CPU minutes (AMD EPYC, Zen 5) and 18 of 19 gates: the picture of answers is found among 32 in
# 0.48, whose interval [0.39, 0.56] begins below the bar of 0.4. 10,000 have not been run (docs/results.md).
data_json = 'data/emoji/chats.json'        # of python -m emoji.pictures
image_root = 'data/emoji'
align_dir = 'out/a1_emoji'
text_jsonl = 'data/emoji/text.jsonl'
replay_jsonl = 'data/emoji/replay.jsonl'
replay_share = 0.1
out_dir = 'out/a2_emoji'
max_seq_len = 256
micro_batch_size = 16
global_batch_size = 32
learning_rate = 3e-4
lora_learning_rate = 5e-4
epoch_samples = 10_000                     # 313 steps
n_eval = 128
n_predictions = 128
max_new_tokens = 24
feature_cache = 'data/emoji/features'
