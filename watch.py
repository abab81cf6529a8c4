"""
How long a rank waits for another one: a rank that hangs ends the run in a line that names it.

Not by torch's own timeout: gloo and NCCL say in a page of their words that it has passed, and not whom they waited for.
"""
import atexit
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress

import torch.distributed as dist


class Watch:
    """Notes the collective that this rank is in. A thread looks at the note and ends the process when it is too old."""
    def __init__(self):
        self.minutes = 24 * 60.0                       # while data is prepared: rank 0 may have every picture to read
        self.n_collectives = 0                         # begun so far: as many on every rank that waits in this one
        self.since = None                              # when the one that is going on began

    def start(self):
        store = dist.distributed_c10d._get_default_store()   # by which the ranks found each other; no public name
        atexit.register(self.tell_end, store)
        sys.excepthook = say_in_a_line
        threading.Thread(target=self.look, args=(store,), daemon=True).start()
        # a connection of its own: asking a rank that was stopped takes for ever, and nobody else can ask meanwhile
        threading.Thread(target=self.hear, args=(store.clone(),), daemon=True).start()

    def tell_end(self, store):
        """At exit: a rank that has not come to shutdown_ranks has failed."""
        if dist.is_initialized():
            with suppress(RuntimeError):
                store.set('ended', str(dist.get_rank()))

    @contextmanager
    def collective(self, device='cpu'):
        """Around every collective, until its result is there. device: type of the one that its tensors are on."""
        self.n_collectives += 1
        self.since = time.monotonic()
        try:
            yield
        except RuntimeError as e:
            if device != 'cpu' or not is_of_gloo(e):   # of CUDA, or of what is computed between the messages
                raise
            raise SystemExit(end_of_another(e))
        finally:
            self.since = None

    def look(self, store):
        told = 0
        while True:
            time.sleep(min(1.0, 6 * self.minutes))     # a tenth of the time at most
            n = self.n_collectives
            since = self.since
            if since is None:
                continue
            if n != told:                              # this one takes long enough for the others to hear of it
                with suppress(RuntimeError):           # rank 0 has ended, and the store with it
                    store.set(f'waiting/{dist.get_rank()}', str(n))
                told = n
            if time.monotonic() - since > 60 * self.minutes:
                time.sleep(1)                          # one that has just come has not told yet
                if self.since != since:
                    continue
                silent = ', '.join(map(str, silent_ranks(store, n)))
                leave(f' has waited {self.minutes:g} min for rank {silent}: was it stopped, does its disk hang? Start '
                      'again to go on; a longer timeout lets it take longer')


    def hear(self, store):
        """Leave when another rank has failed while this one waits: gloo says so itself, NCCL would wait for ever."""
        with suppress(RuntimeError):                   # the store has gone with rank 0
            while True:
                time.sleep(1)
                if self.since is not None and store.check(['ended']):
                    time.sleep(1)                      # gloo's own line comes first where there is one
                    leave(f': rank {store.get("ended").decode()} has ended, its own lines say why')


def is_of_gloo(e):
    return isinstance(e, RuntimeError) and 'gloo' in str(e)


def end_of_another(e):
    return f'rank {dist.get_rank()}: another rank has ended, its own lines say why ({str(e).splitlines()[0]})'


def say_in_a_line(kind, e, traceback):
    """Of weights in shards the messages are inside of the model: what is raised there comes out anywhere."""
    if is_of_gloo(e) and dist.is_initialized():
        sys.stderr.write(end_of_another(e) + '\n')
    else:
        sys.__excepthook__(kind, e, traceback)


def leave(words):
    """End this process with a line about its rank; the main thread is inside torch and would not hear."""
    sys.stderr.write(f'rank {dist.get_rank()}{words}\n')
    sys.stdout.flush()
    os._exit(1)


def silent_ranks(store, n):
    """The ranks that have not told that they wait in collective n."""
    found = []

    def ask():
        silent = []
        with suppress(RuntimeError):
            for rank in range(dist.get_world_size()):
                key = f'waiting/{rank}'
                if not store.check([key]) or store.get(key) != str(n).encode():
                    silent.append(rank)
            found.extend(silent)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(5)
    return found or [0]                                # no answer: without torchrun rank 0 keeps the store


WATCH = Watch()


def wait_at_most(minutes):
    """From here on a rank that waits so long for another one ends, in a line that names it."""
    WATCH.minutes = minutes
