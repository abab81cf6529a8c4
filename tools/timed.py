"""
Run a script and note where its time and its memory went: what tools/rehearsal.py makes its table from.

reads   what the script reads
writes  TIMES, a JSON object of seconds by phase (on a CPU those of the processor: what else runs there takes no part),
        memory, and the largest micro-batch; of rank 0
done    when the script is; its exit status is the script's

$ python -m tools.timed out/times.json train_a1.py configs/a1_small.py
"""
import json
import os
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path

import torch

import common
import training

BEGAN = {time.perf_counter: time.perf_counter(), time.process_time: 0.0}


def memory_mb(device, field='VmRSS'):
    """What this process has in memory, in MB; its highest since forget_peak with field = 'VmHWM'."""
    if device.type == 'cuda':
        now = torch.cuda.memory_allocated(device)
        return round((torch.cuda.max_memory_allocated(device) if field == 'VmHWM' else now) / 2**20)
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return round(int(line.split()[1]) / 2**10)


def forget_peak(device):
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:                                    # not everywhere: the peak is then that of the start as well
        pass


class Times:
    """Seconds by phase, since this process began."""
    def __init__(self):
        self.clock = time.process_time
        self.seconds = dict.fromkeys(('start', 'data', 'step', 'evaluation', 'checkpoint'), 0.0)
        self.n_steps = 0
        self.memory = {}
        self.micro_batch = {}
        self.device = torch.device('cpu')

    def note_micro_batch(self, batch, text_rows):
        """Keep the largest: examples, tokens, labels that are text, labels that are codes."""
        if len(batch.input_ids) > self.micro_batch.get('tokens', 0):
            n_codes = int((batch.labels >= text_rows).sum())
            self.micro_batch = {'examples': len(batch.items), 'tokens': len(batch.input_ids),
                                'labels': len(batch.labels) - n_codes, 'codes': n_codes}

    def record(self):
        total = self.since_start()
        if self.clock == time.process_time:            # what a script starts counts when it has ended
            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            total += children.ru_utime + children.ru_stime
        rest = total - sum(self.seconds.values())
        return {'seconds': {**self.seconds, 'rest': rest, 'total': total}, 'n_steps': self.n_steps,
                'memory_mb': self.memory, 'micro_batch': self.micro_batch, 'device': self.device.type}

    def since_start(self):
        return self.clock() - BEGAN[self.clock]


def timed_meter(times, text_rows):
    """Meter, of a loop whose evaluations lie between pause() and go_on(); the script imports it in Meter's place."""
    class TimedMeter(training.Meter):
        def __init__(self):
            super().__init__()
            times.seconds['start'] = times.since_start()
            self.resumed = self.paused = times.clock()
            self.in_checkpoint = 0.0

        def pause(self):
            super().pause()
            self.paused = times.clock()
            times.seconds['step'] += self.paused - self.resumed
            self.resumed = self.paused                 # read() pauses and begins a new window
            if times.n_steps:
                times.memory['steps'] = memory_mb(times.device, 'VmHWM')
            self.in_checkpoint = times.seconds['checkpoint']

        def go_on(self):
            super().go_on()
            self.resumed = times.clock()
            saved = times.seconds['checkpoint'] - self.in_checkpoint
            times.seconds['evaluation'] += self.resumed - self.paused - saved
            if not times.n_steps:
                forget_peak(times.device)

        def next_of(self, batches_of_steps):
            start = times.clock()
            batches = super().next_of(batches_of_steps)
            waited = times.clock() - start
            times.seconds['data'] += waited
            times.seconds['step'] -= waited
            return batches

        def add(self, loss, n_labels, batches):
            super().add(loss, n_labels, batches)
            times.n_steps += 1
            for batch in batches:
                times.note_micro_batch(batch, text_rows)

    return TimedMeter


def run(path, script, args, text_rows=151_936):
    """Run a script with these arguments, and write its times. text_rows: labels from this id on are codes."""
    times = Times()
    init_ranks, save_checkpoint, meter = common.init_ranks, common.save_checkpoint, training.Meter

    def note_device(*asked):
        found = init_ranks(*asked)
        times.device = found[2]
        times.clock = time.perf_counter if times.device.type == 'cuda' else time.process_time
        times.memory['before'] = memory_mb(times.device)
        return found

    def timed_save(*what):
        start = times.clock()
        save_checkpoint(*what)
        times.seconds['checkpoint'] += times.clock() - start

    common.init_ranks, common.save_checkpoint, training.Meter = note_device, timed_save, timed_meter(times, text_rows)
    argv, sys.argv = sys.argv, [str(script), *args]
    try:
        runpy.run_path(str(script), run_name='__main__')
    finally:
        common.init_ranks, common.save_checkpoint, training.Meter = init_ranks, save_checkpoint, meter
        sys.argv = argv
        if os.environ.get('RANK', '0') == '0':
            common.write_atomic(path, json.dumps(times.record(), indent=1))


def start(path, script, args, *, folder, log, ranks=1):
    """Run this file as a process of its own, or one for each rank, inside a folder; its exit status. log: a file for
    what it prints."""
    command = [sys.executable, '-m', 'tools.timed', str(path), str(script), *args]
    if ranks > 1:
        command[1:2] = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '-m']
    env = {**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parent.parent), 'HF_HUB_OFFLINE': '1'}
    with open(log, 'w') as f:
        return subprocess.run(command, cwd=folder, env=env, stdout=f, stderr=subprocess.STDOUT).returncode


if __name__ == '__main__':
    if len(sys.argv) < 3:
        raise SystemExit(__doc__.strip())
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
