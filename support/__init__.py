"""The ground floor: what keeps a run safe and reports it, a room a concern.

The top level is what you read to understand or change DPO; support/ keeps a run safe and reports
it. No room imports anything of the top level: what a room needs of it comes as an argument.

config      settings, read and checked            checkpoint  a run's folder, lock and checkpoints
sources     names, the Hub, its cache, stand-ins  run_log     metrics.jsonl, tracker, progress bar
readers     files and folders of records          report      curves, report.md, model card
shapes      which columns mean what               verdict     what an evaluation can claim, advice
turns       what a cell says, as turns            preference  what the reference prefers by itself
explain     the Hub's errors in plain words       sweep       a sweep's table and picture
model       loading, LoRA, float32, saving        dry_run     the data and a pair, the cost
adapters    a model that is an adapter, merged    sampler     answers that a model draws
attention   of a row whose answers share a prompt failures    what ends a run, what to do then
template    a chat template against generation    cache       tensors that runs share
machine     device and dtype, speed, memory       processes   torchrun's ranks, signals, printing
checks      what is asked of model and pairs      columns     names of columns of a set's own
files       files written whole or not at all     errors      InputError
four_bit    frozen weights in 4 bits              labels      which answer a label means
kv_cache    keys and values of drawn answers      reward      of an answer, by function or model
samples     figures of sampled answers            rounds      of iterative DPO, and their table
intervals   means with 95 % intervals
"""
