"""The ground floor: what keeps a run safe and reports it, a room a concern.

The top level is what you read to understand or change DPO; support/ keeps a run safe and reports
it. No room imports anything of the top level: what a room needs of it comes as an argument.

config      settings, read and checked            checkpoint  a run's folder, lock and checkpoints
sources     names, the Hub, its cache, stand-ins  run_log     metrics.jsonl, tracker, progress bar
readers     files and folders of records          report      curves, report.md, model card
explain     the Hub's errors in plain words       verdict     what an evaluation can claim, advice
model       loading, adapters, float32, saving    sweep       a sweep's table and picture
template    a chat template against generation    dry_run     the data and a pair, the cost
machine     device and dtype, speed, memory       sampler     answers that a model gives
checks      what is asked of model and pairs      failures    what ends a run, what to do then
processes   torchrun's ranks, signals, printing   cache       tensors that runs share
files       files written whole or not at all     errors      InputError
"""
