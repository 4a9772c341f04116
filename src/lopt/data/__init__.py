"""Training data: from files, the Hub or a generator to what TRL's trainers take.

- `load`: `load_rows` reads rows or opens a stream of them, `split_held_out` sets some aside.
- `presets`: `PRESETS`, public data sets by name, with columns and licence.
- `columns`: `infer_format` finds the columns that count; `formats`: `format_rows` makes the examples of SFT,
  row by row in `examples`, from `messages` for the chat template (`chat`).
- `cells`: values of JSON as the file has them; `json_file`, `csv_file`, `parquet_file`: how files are read.
- `rendering`: `lost` finds what a chat template leaves out of messages; `notes` counts it.
- `questions`: `question_rows` makes the examples of GRPO, of the kinds in `question_tasks`.
- `procedural`: `make_task` and `train_and_held_out` make arithmetic problems, `is_correct` marks them.
"""
