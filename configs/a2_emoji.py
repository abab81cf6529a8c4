# Questions about real pictures to a real language model: the aligned SmolLM2-135M learns to answer about emoji.
# $ python train_a2.py configs/a2_emoji.py
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
epoch_samples = 6_000                      # 188 steps
n_eval = 128
n_predictions = 128
max_new_tokens = 24
feature_cache = 'data/emoji/features'
