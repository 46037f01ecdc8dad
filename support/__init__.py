"""The ground floor: what keeps a run safe and reports it, a room a concern.

The top level is what you read to understand or change DPO; support/ keeps a run safe and reports
it. No room imports anything of the top level: what a room needs of it comes as an argument.

config      settings, read and checked            checkpoint  a run's folder, lock and checkpoints
sources     files, the Hub, its cache, stand-ins  run_log     metrics.jsonl, tracker, progress bar
explain     the Hub's errors in plain words       report      curves, report.md, model card
model       loading, LoRA, float32, saving        verdict     what an evaluation can claim, advice
adapters    a model that is an adapter, merged    preference  what the reference prefers by itself
template    a chat template against generation    sweep       a sweep's table and picture
machine     device and dtype, speed, memory       dry_run     a pair as the model sees it, the cost
checks      what is asked of model and pairs      sampler     answers that a model gives
processes   torchrun's ranks, signals, printing   failures    what ends a run, what to do then
files       files written whole or not at all     cache       tensors that runs share
errors      InputError
"""
