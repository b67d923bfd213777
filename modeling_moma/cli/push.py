# SPDX-License-Identifier: Apache-2.0
"""Check a model and its processor, and put both on the Hub in one commit or into a folder.

A folder without code gets that of the installed packages, so that it loads with `trust_remote_code=True` elsewhere.
"""

import argparse
import sys


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder laid out as the repository, or of a saved model")
    parser.add_argument("--processor", help="folder of the processor, where the model's folder has none")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--repo-id", help="USER/NAME on the Hub; made where missing")
    target.add_argument("--output", help="write the repository into this folder, missing or empty, and send nothing")
    parser.add_argument("--private", action="store_true", help="let nobody else see a new repository")
    parser.add_argument("--revision", help="branch, made where missing; default: main")
    parser.add_argument("--message", default="Upload model and processor", help="of the commit")
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="PATH=USER/NAME",
        help="the Hub's id of a data set that the card names by a local path; may be given again",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and list what would be sent, and stop")
    args = parser.parse_args(arguments)
    wrong = [pair for pair in args.dataset if not all(pair.partition("="))]
    if wrong:
        parser.error(f"--dataset {wrong[0]}: write the path as in the card, =, and the id on the Hub")
    return args


def run(args: argparse.Namespace) -> int:
    from ..hub.upload import UploadError, prepare, push, write_repository

    try:
        datasets = dict(pair.split("=", 1) for pair in args.dataset)
        upload = prepare(args.model, args.processor, datasets)
        for name in upload.files:
            print(f"{upload.size(name):>14,}  {name}")
        for name, reason in upload.left_out.items():
            print(f"      left out  {name} ({reason})")
        total = sum(map(upload.size, upload.files))
        place = args.output or f"{args.revision or 'main'} of {args.repo_id}"
        print(f"{total:>14,}  bytes in {len(upload.files)} files, for {place}")
        if args.dry_run:
            return 0
        if args.output:
            print(write_repository(upload, args.output))
        else:
            print(push(upload, args.repo_id, args.private, args.revision, args.message).commit_url)
    except ValueError as error:
        problems = str(error)
        # many are a list
        separator = "\n" if "\n" in problems else " "
        print(f"moma push: refused, nothing was sent:{separator}{problems}", file=sys.stderr)
        return 2
    except UploadError as error:
        print(f"moma push: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(parse_arguments(arguments))
