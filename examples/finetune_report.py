"""What finetune_usm_lite.py found: the gate that it must pass, the summary for report.json, the report as text."""

WER_TOLERANCE = 0.01  # absolute


def failures(exact, rates):
    """Return what makes the run a failed one: a packed file that reloads to other kernels, LiteRT far from Keras."""
    found = [] if exact else ["the packed file does not reload to bit-identical effective kernels"]
    difference = abs(rates["fine-tuned, LiteRT"].wer - rates["fine-tuned"].wer)
    if difference > WER_TOLERANCE:
        found.append(f"LiteRT's word error rate differs from Keras' by {difference:.4f}, allowed are {WER_TOLERANCE}")
    return found


def describe_split(task):
    """Say how many speakers of the test split were heard before."""
    speakers = {split: {row.speaker for row in rows} for split, rows in task.utterances.items()}
    known = speakers["test"] & (speakers["train"] | speakers["dev"])
    if not known:
        return "speakers or voices of the test split are in no other split"
    return f"{len(known)} of {len(speakers['test'])} test speakers are in other splits too"


def summarise(usm, args, task, float_model, model, rates):
    """Return what was done and what came of it, without paths of this machine."""
    table = usm.report(model)
    local = ("data", "output", "float_model", "pretrained")
    return {
        "corpus": task.corpus.name,
        "synthetic": task.corpus.synthetic,
        "split": describe_split(task),
        "left_out": {split: len(rows) for split, rows in task.problems.items()},
        "arguments": {name: value for name, value in vars(args).items() if name not in local},
        "pretrained": args.pretrained is not None,
        "error_rates": {name: {"wer": rate.wer, "cer": rate.cer, "words": rate.words} for name, rate in rates.items()},
        "weights": table.weights,
        "float32_bytes": table.float32_bytes,
        "kernel_bits_per_weight": table.kernel_bits_per_weight,
        "compressed_share": table.compressed_share,
        "tensors": len(float_model.weights),
        "compressed_tensors": len(usm.compressed_layers(model)),
    }


def print_report(args, corpus, summary, rates, differing):
    """Print the result."""
    speech = "SYNTHETIC SPEECH (espeak-ng), not human recordings" if corpus.synthetic else "recorded speech"
    print(f"\n{'=' * 100}\nUSM-Lite report: int{args.bits}, N:M {args.sparsity}, preset {args.preset}")
    print(f"data: {corpus.name}, {speech}. {corpus.description}")
    print(f"rows that could not be used: {sum(summary['left_out'].values())} (left_out.json)")
    print(f"\ntest split, greedy decoding, no language model; {summary['split']}:")
    for name, rate in rates.items():
        change = "" if name == "float" else f"   {rate.wer / max(rates['float'].wer, 1e-9) - 1:+.1%} relative"
        print(f"  {name:20} {rate}{change}")
    if not args.control:
        print(f"  (fine-tuning added {args.finetune_epochs} epochs; --control trains the float model as long)")
    print(f"\n{summary['compressed_tensors']} of {summary['tensors']} tensors compressed; they hold", end=" ")
    print(f"{summary['compressed_share']:.1%} of the {summary['weights']:,} weights and take", end=" ")
    print(f"{summary['kernel_bits_per_weight']:.3f} bits per weight with scales")
    print(f"\nbytes on disk (FP32 weights alone: {summary['float32_bytes']:,})")
    for name, size in summary["bytes"].items():
        print(f"  {name:20} {size:12,}   {size / summary['float32_bytes']:7.2%} of FP32")
    exact = "yes" if summary["packed_reloads_bit_identical"] else "NO"
    print(f"\npacked file reloads to bit-identical effective kernels: {exact}")
    print(f"LiteRT against Keras: {len(differing)} of {rates['float'].utterances} texts differ", end="")
    print(f"{' (LiteRT quantizes activations to int8)' if differing else ''}; WER may by {WER_TOLERANCE} absolute")
    for expected, got in differing[:5]:
        print(f"  Keras {expected!r}  LiteRT {got!r}")
    print(f"LiteRT real-time factor on one thread: {summary['litert_real_time_factor']:.4f}")
    print("seconds of this start:", ", ".join(f"{stage} {taken}" for stage, taken in summary["seconds"].items()))
    print(f"\nfiles and report.json: {args.output}")
