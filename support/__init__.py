"""The ground floor: what keeps a run safe and reports it, a room a concern.

The top level is what you read to understand or change DPO; support/ keeps a run safe and reports
it. No room imports anything of the top level: what a room needs of it comes as an argument.

config      settings, read and checked            checkpoint  a run's folder, lock and checkpoints
sources     files, the Hub, its cache, stand-ins  run_log     metrics.jsonl, tracker, progress bar
model       loading, adapters, float32, saving    report      curves, report.md, model card
machine     device and dtype, speed, memory       verdict     what an evaluation can claim, advice
checks      what is asked of model and pairs      sweep       a sweep's table and picture
processes   torchrun's ranks, signals, printing   dry_run     a pair as the model sees it, the cost
files       files written whole or not at all     sampler     answers that a model gives
cache       tensors that runs share               errors      InputError
"""
