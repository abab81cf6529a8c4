"""
How long a rank waits for another one: a rank that hangs ends the run in a line that names it, one that has ended does
so within seconds, and one that works on its disk is waited for as long as it takes.

Not by torch's own timeout: gloo and NCCL say in a page of their words that it has passed, and not whom they waited for.
"""
import atexit
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress

import torch.distributed as dist


DAY = 24 * 60.0                                        # in minutes
BYE = b'.'


class Watch:
    """Notes since when this rank waits, in a collective or in the store. Threads end the process when that is too long
    ago (look), or when another rank has ended (hear), which is told by connections between rank 0 and every other one
    (follow).

    In the store, by which all of them speak with each other:

    door          where rank 0 takes the connections, and a word that tells a rank from a stranger
    here/RANK     how many meetings in the store the rank has come to
    sign/RANK     a number that rises once in a second, a sign of life
    waiting/RANK  the number of a wait, where it has taken a second
    ended         the rank that was the last to end before its good-bye
    """
    def __init__(self):
        self.minutes = DAY                             # while data is prepared: rank 0 may have every picture to read
        self.n_waits = 0                               # begun so far: as many on every rank that waits in this one
        self.n_meetings = 0                            # of these in the store
        self.since = None                              # when the one that is going on began, or others last gave a sign
        self.lines = []                                # connections of rank 0 and each other rank

    def start(self):
        self.rank = dist.get_rank()                    # its threads outlive the process group
        self.n_ranks = dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()   # by which the ranks found each other; no public name
        # connections of their own: asking a rank that was stopped takes for ever, and nobody else can ask meanwhile
        self.store = store.clone()
        self.store.set(f'here/{self.rank}', '0')
        self.store.set(f'sign/{self.rank}', '0')
        heard = store.clone()
        self.connect(heard)
        atexit.register(self.fail)
        sys.excepthook = say_in_a_line
        threading.Thread(target=self.look, args=(store,), daemon=True).start()
        threading.Thread(target=self.hear, args=(heard,), daemon=True).start()

    def connect(self, store):
        """A line from every rank to rank 0: the system closes it when a process ends, however it does."""
        if self.rank == 0:
            server = socket.create_server(('', 0))
            word = secrets.token_hex(16)
            store.set('door', f'{server.getsockname()[1]} {word}')
            threading.Thread(target=self.let_in, args=(server, word, store), daemon=True).start()
            return
        port, word = store.get('door').decode().split()
        with suppress(OSError):                        # no way to rank 0 but gloo's, which will do
            line = socket.create_connection((os.environ['MASTER_ADDR'], int(port)), timeout=60)
            line.sendall(f'{word} {self.rank:8}'.encode())
            self.follow(line, 0, store)

    def let_in(self, server, word, store):
        while True:
            line, _ = server.accept()
            line.settimeout(60)
            with suppress(OSError, ValueError):        # a stranger
                sent, rank = line.recv(len(word) + 9, socket.MSG_WAITALL).decode().split()
                if sent == word:
                    self.follow(line, int(rank), store)

    def follow(self, line, rank, store):
        """Tell all when another rank says on this line that it has failed, or closes it without a good-bye."""
        def read():
            with suppress(OSError):
                if line.recv(1) == BYE:
                    return
            with suppress(RuntimeError):               # rank 0 has ended, and the store with it
                store.set('ended', str(rank))

        line.settimeout(None)
        self.lines.append(line)
        threading.Thread(target=read, daemon=True).start()

    def end(self, word=BYE):
        """This rank has nothing to wait for any more, and the others not for it."""
        while self.lines:
            with suppress(OSError):
                self.lines.pop().sendall(word)

    def fail(self):
        """At exit: a rank that has not come to shutdown_ranks. Its threads may keep the process for seconds."""
        if dist.is_initialized():
            self.end(b'!')

    @contextmanager
    def collective(self, device='cpu'):
        """Around every collective, until its result is there. device: type of the one that its tensors are on."""
        self.n_waits += 1
        self.since = time.monotonic()
        try:
            yield
        except RuntimeError as e:
            # else of CUDA, or of what is computed between the messages
            if not isinstance(e, dist.DistError) and (device != 'cpu' or not is_of_gloo(e)):
                raise
            raise SystemExit(end_of_another(e))
        finally:
            self.since = None

    def in_store(self):
        """Wait until every rank is here, and in no collective: as long as those that are not give signs of life, up to
        a day, since what they do with their disks may take that long."""
        ranks = range(self.n_ranks)
        self.n_meetings += 1
        with self.collective():
            self.store.set(f'here/{self.rank}', str(self.n_meetings))
            began = heard = time.monotonic()
            signs = {}
            pause = 0.002
            while True:
                here = self.store.multi_get([f'here/{rank}' for rank in ranks])
                absent = [rank for rank in ranks if int(here[rank]) < self.n_meetings]
                if not absent:
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.25)
                if time.monotonic() - heard < 1:       # a sign comes once in a second
                    continue
                found = dict(zip(absent, self.store.multi_get([f'sign/{rank}' for rank in absent])))
                if all(found[rank] != signs.get(rank) for rank in absent):
                    signs = found
                    heard = time.monotonic()
                    self.since = min(heard, began + 60 * DAY)

    def look(self, store):
        announced = n_signs = 0
        while dist.is_initialized():
            time.sleep(min(1.0, 6 * self.minutes))     # a tenth of the time at most
            n_signs += 1
            n = self.n_waits
            since = self.since
            with suppress(RuntimeError):               # rank 0 has ended, and the store with it
                store.set(f'sign/{self.rank}', str(n_signs))
                if since is not None and n != announced:   # it takes long enough for the others to hear of it
                    store.set(f'waiting/{self.rank}', str(n))
                    announced = n
            if since is not None and time.monotonic() - since > 60 * self.minutes:
                time.sleep(1)                          # one that has just come has not announced it yet
                if self.since != since:
                    continue
                silent = ', '.join(map(str, silent_ranks(store, n)))
                leave(f' has waited {self.minutes:g} min for rank {silent}: was it stopped, does its disk hang? Start '
                      'again to go on; a longer timeout lets it take longer')

    def hear(self, store):
        """Leave when another rank has ended while this one waits: gloo says so itself, NCCL would wait for ever."""
        while dist.is_initialized():
            time.sleep(1)
            if self.since is None:
                continue
            try:
                ended = store.get('ended').decode() if store.check(['ended']) else None
            except RuntimeError:                       # without torchrun rank 0 keeps the store
                ended = '0'
            if ended is not None:
                time.sleep(1)                          # gloo's own line comes first where there is one
                if self.since is not None:
                    leave(f': rank {ended} has ended, its own lines say why')


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
    """The ranks that have not announced that they wait in wait number n."""
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
