"""Training data: from files, the Hub or a generator to what TRL's trainers take.

- `load`: `load_rows` reads rows or opens a stream of them, `split_held_out` sets some aside.
- `presets`: `PRESETS`, public data sets by name, with columns and licence.
- `formats`: `infer_format` finds the columns that count, `format_rows` makes the examples of SFT.
- `questions`: `question_rows` makes the examples of GRPO, of the kinds in `question_tasks`.
- `procedural`: `make_task` and `train_and_held_out` make arithmetic problems, `is_correct` marks them.
"""
