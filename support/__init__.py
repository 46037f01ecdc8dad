"""The ground floor: what keeps a run safe and reports it, a room a concern.

The top level is what you read to understand or change DPO; support/ keeps a run safe and reports
it. No room imports anything of the top level: what a room needs of it comes as an argument.

config      settings, read and checked            run_log     metrics.jsonl, tracker, progress bar
sources     files, the Hub, its cache, stand-ins  report      curves, report.md, model card, sweep
model       loading, adapters, float32, saving    dry_run     a pair as the model sees it, the cost
machine     device and dtype, speed, memory       sampler     answers that a model gives
processes   torchrun's ranks, signals, printing   cache       tensors that runs share
checkpoint  a run's folder, lock and checkpoints  files       files written whole or not at all
checks      what is asked of model and pairs  errors      InputError
"""
