"""
The language model in shards, by FSDP2 of torch: each rank holds a part of every matrix of the layers, and has a layer
whole only while it computes it.

Whole on every rank stay the embeddings, the head, the norms, LoRA, the connector and the new rows: their gradients are
added up by common.reduce_gradients, as without shards. The engine adds up those of the matrices.

In training mode the weights are in shards, in eval mode they are whole. Every layer of a model in shards waits for all
ranks, and ranks evaluate and generate different numbers of batches and of tokens: each does so for itself.
"""
import pickle
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import all_gather, barrier, beside_of, first_line, rank_of, save_checkpoint
from watch import WATCH

# -----------------------------------------------------------------------------
# into shards and back


def shard_layers(llm, device):
    """Cut the matrices of the layers of a language model, which is on a CPU, over the ranks, and bring it to the
    device, a layer at a time. Nothing but the latter on a single rank. LoRA has to be there already."""
    if dist.is_initialized():
        if not hasattr(llm.base_model, 'layers'):      # GPT-2 calls them h
            raise SystemExit(f'a {llm.config.model_type} has no base_model.layers to cut: set shard = False')
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # learned weights are in float32 and multiplied in the precision of the frozen ones, as autocast has it
        precision = torch.bfloat16 if llm.dtype == torch.bfloat16 else None
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
        shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
        for layer in llm.base_model.layers:
            whole = {p for name, p in layer.named_parameters() if p.ndim < 2 or 'lora_' in name}
            shard(layer, ignored_params=whole)
        # of the root nothing is left to cut: it starts the next layer's gathering while one is computed
        shard(llm.base_model, ignored_params=set(llm.base_model.parameters()))
        for module in sharded_modules(llm):
            module.set_gradient_divide_factor(1.0)     # sums: the loss was divided by the labels of all ranks
            module.set_force_sum_reduction_for_comms(True)
        back_to_shards(llm)
    llm.to(device)


def sharded_modules(llm):
    return [module for module in llm.base_model.modules() if isinstance(module, FSDPModule)]


def make_whole(llm):
    """Every layer whole on every rank until back_to_shards. On every rank; done at once where it is."""
    modules = sharded_modules(llm)
    if not modules or llm.is_whole:
        return
    with WATCH.collective(llm.device.type):
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
    llm.is_whole = True


def back_to_shards(llm):
    for module in sharded_modules(llm):
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()
    llm.is_whole = False


def step_together(llm, batches):
    """This rank's batches of a step, one by one, each to go forward and backward. With shards all ranks have to make as
    many passes: after its own batches a rank that has fewer makes some of nothing."""
    if not sharded_modules(llm):
        yield from batches
        return
    n_missing = max(all_gather(len(batches))) - len(batches)
    with WATCH.collective(llm.device.type):
        yield from batches
        for _ in range(n_missing):
            pass_of_nothing(llm)


def pass_of_nothing(llm):
    """Forward and backward through the layers with a token that has no label: it adds zeros to every gradient."""
    embeds = torch.zeros(1, 1, llm.config.hidden_size, device=llm.device, dtype=llm.dtype, requires_grad=True)
    with torch.autocast(llm.device.type, torch.bfloat16, enabled=llm.dtype == torch.bfloat16):
        hidden = llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state        # (1, 1, D)
    (0 * hidden.float().sum()).backward()


# -----------------------------------------------------------------------------
# checkpoints of what is in shards: each rank writes its own, any number of ranks reads them

FOLDER = 'shards'                                      # in a checkpoint, in the format of torch.distributed.checkpoint


def save_with_shards(folder, tensors, meta):
    """common.save_checkpoint on every rank: shards among the tensors, at any depth of dicts, are written by whoever
    holds them."""
    shards = {}
    tensors = split_off_shards(tensors, '', shards)
    if rank_of()[0] == 0:
        more = partial(write_shards, shards) if shards else None
        save_checkpoint(folder, tensors, meta, more)
    elif shards:
        try:
            write_shards(shards, beside_of(Path(folder)))
        except OSError as e:
            raise SystemExit(f'{folder}: cannot write the shards of rank {rank_of()[0]} ({e})')


def split_off_shards(value, path, shards):
    """value without the DTensors in it, which go to shards by their path, 'optimizer/state/3/exp_avg'."""
    if isinstance(value, dict):
        kept = {key: split_off_shards(part, f'{path}{key}/', shards) for key, part in value.items()}
        return {key: part for key, part in kept.items() if part is not None}
    if isinstance(value, DTensor):
        shards[path.removesuffix('/')] = value.detach()
        return None
    return value


def write_shards(shards, folder):
    barrier()                                          # rank 0 has made the folder
    try:
        with WATCH.collective():
            dcp.save(shards, checkpoint_id=folder / FOLDER)
    except CheckpointException as e:                   # no Exception, and a page long: the failures of all ranks
        raise OSError(first_line(list(e.failures.values())[0][0]))


def join_shards(tensors, folder, places=None, only=''):
    """The tensors of a checkpoint with those that were written in shards put back where split_off_shards found them.

    places: {path: a tensor that is in shards, or whole, as what belongs there is to be}, on every rank; without one it
    is whole, on a CPU. only: beginning of the paths that are wanted. Also cuts whole ones whose place is in shards.
    """
    places = places or {}
    found = {}
    if (folder / FOLDER).exists():
        reader = TensorReader(folder / FOLDER)
        for path, stored in reader.read_metadata().state_dict_metadata.items():
            if path.startswith(only):
                like = places.get(path, torch.empty(stored.size, dtype=stored.properties.dtype, device='meta'))
                found[path] = torch.zeros_like(like, device='cpu' if like.is_meta else None)
        with WATCH.collective():
            dcp.load(found, storage_reader=reader, no_dist=not dist.is_initialized())
    for path, like in places.items():
        if isinstance(like, DTensor) and path not in found:
            whole = find(tensors, path).to(like.device)
            found[path] = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    for path, tensor in found.items():
        *parents, name = keys_of(path)
        part = tensors
        for key in parents:
            part = part.setdefault(key, {})
        part[name] = tensor
    return tensors


def keys_of(path):
    """'optimizer/state/3/exp_avg' -> ['optimizer', 'state', 3, 'exp_avg']"""
    return [int(key) if key.isdigit() else key for key in path.split('/')]


def find(tensors, path):
    for key in keys_of(path):
        tensors = tensors[key]
    return tensors


def places_of(tuned, optimizer):
    """For join_shards: where what is learned and the two moments of AdamW belong. tuned: {name: parameter}."""
    places = {f'tuned/{name}': p.detach() for name, p in tuned.items()}
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    for n, p in enumerate(parameters):
        for moment in 'exp_avg', 'exp_avg_sq':
            places[f'optimizer/state/{n}/{moment}'] = p.detach()
    return places


class TensorReader(dcp.FileSystemReader):
    """Of its table of contents, which is a pickle, only what describes tensors is made: no code in it runs."""
    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / '.metadata', 'rb') as f:
            metadata = TensorUnpickler(f).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class TensorUnpickler(pickle.Unpickler):
    KNOWN = {
        'torch.distributed.checkpoint.metadata': {
            'Metadata', 'TensorStorageMetadata', 'TensorProperties', 'ChunkStorageMetadata', 'MetadataIndex',
            'StorageMeta', '_MEM_FORMAT_ENCODING'},
        'torch.distributed.checkpoint.filesystem': {'_StorageInfo'},
        'torch': {'Size', 'float32', 'bfloat16'},
        'torch.serialization': {'_get_layout'},
        'pathlib': {'PosixPath'},
        'pathlib._local': {'PosixPath'}}               # Python 3.13

    def find_class(self, module, name):
        if name not in self.KNOWN.get(module, ()):
            raise ValueError(f'{module}.{name} in its table of contents describes no tensor')
        return super().find_class(module, name)
