# SPDX-License-Identifier: Apache-2.0
"""Check a model and its processor, and put both on the Hub in one commit or into a folder.

A folder without code gets that of the installed packages, so that it loads with `trust_remote_code=True` elsewhere.
"""

import sys
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator

from ..errors_moma import InputError
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


def _renamed(pair: str) -> str:
    if not all(pair.partition("=")):
        raise InputError("the path as in the card, =, and the id on the Hub")
    return pair


MESSAGE = "Upload model and processor"
Renamed = Annotated[str, AfterValidator(_renamed)]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma push`.

    Args:
        model (`str`):
            folder laid out as the repository, or of a saved model.
        processor (`str`, *optional*):
            folder of the processor, where the model's folder has none.
        repo_id (`str`, *optional*):
            USER/NAME on the Hub; made where missing.
        output (`str`, *optional*):
            write the repository into this folder, missing or empty, and send nothing.
        private (`bool`, *optional*, defaults to `False`):
            let nobody else see a new repository.
        revision (`str`, *optional*):
            branch, made where missing; main by default.
        message (`str`, *optional*, defaults to `"Upload model and processor"`):
            of the commit.
        dataset (`list[str]`, *optional*, defaults to `[]`):
            the Hub's id of a data set that the card names by a local path; may be given again.
        dry_run (`bool`, *optional*, defaults to `False`):
            check and list what would be sent, and stop.
    """

    model: str
    processor: str | None = None
    repo_id: Annotated[str | None, Flag(one_of="target")] = None
    output: Annotated[str | None, Flag(one_of="target")] = None
    private: bool = False
    revision: str | None = None
    message: str = MESSAGE
    dataset: Annotated[list[Renamed], Flag(metavar="PATH=USER/NAME", is_repeated=True)] = field(default_factory=list)
    dry_run: bool = False


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, required=("target",))


def check_target(args: Arguments) -> None:
    """Raise `ValueError` at an empty name, a folder that cannot be written, or beside one a flag that is the Hub's."""
    from ..utils.atomic_files import check_new_folder

    for flag, value in (("--revision", args.revision), ("--message", args.message)):
        if value == "":
            raise InputError(f"{flag} '': the Hub takes none that is empty; is a variable of the shell empty?")
    if args.output is None:
        return
    if not args.output:
        raise InputError("--output '': it names no folder; is a variable of the shell empty?")
    of_hub = {"--private": args.private, "--revision": args.revision, "--message": args.message != MESSAGE}
    for flag, is_given in of_hub.items():
        if is_given:
            raise InputError(f"{flag}: of the Hub, to which --output sends nothing.")
    check_new_folder(args.output)


def datasets_of(pairs: list[str]) -> dict[str, str]:
    """Return the ids of data sets by the paths of the card; `ValueError` for a path with two ids."""
    found: dict[str, str] = {}
    for pair in pairs:
        local, identifier = pair.split("=", 1)
        if found.setdefault(local, identifier) != identifier:
            raise InputError(f"--dataset {pair}: {local!r} has the id {found[local]!r} already; leave one out.")
    return found


def run(args: Arguments) -> int:
    with without_import_notices():
        from ..hub.upload import UploadError, check_repo_id, prepare, push, write_repository

    try:
        check_repo_id(args.repo_id)
        check_target(args)
        upload = prepare(args.model, args.processor, datasets_of(args.dataset))
        for name in upload.files:
            print(f"{upload.size(name):>14,}  {name}")
        for name, reason in upload.left_out.items():
            print(f"      left out  {name} ({reason})")
        total = sum(map(upload.size, upload.files))
        place = f"{args.revision or 'main'} of {args.repo_id}" if args.output is None else args.output
        print(f"{total:>14,}  bytes in {len(upload.files)} files, for {place}")
        if args.dry_run:
            return 0
        if args.output is not None:
            print(write_repository(upload, args.output))
        elif args.repo_id:
            print(push(upload, args.repo_id, args.private, args.revision, args.message).commit_url)
    except InputError as error:
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
