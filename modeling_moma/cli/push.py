# SPDX-License-Identifier: Apache-2.0
"""Check a model and its processor, and put both on the Hub in one commit or into a folder.

A folder without code gets that of the installed packages, so that it loads with `trust_remote_code=True` elsewhere.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import AfterValidator

from ..errors_moma import InputError
from ..utils.messages import without_import_notices
from .arguments import Flag, parse_fields


def _renamed(pair: str) -> str:
    if not all(pair.partition("=")):
        raise InputError("the path as in the card, =, and the id on the Hub")
    return pair


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
    message: str = "Upload model and processor"
    dataset: Annotated[list[Renamed], Flag(metavar="PATH=USER/NAME", is_repeated=True)] = field(default_factory=list)
    dry_run: bool = False


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments, required=("target",))


def run(args: Arguments) -> int:
    from ..utils.atomic_files import check_new_folder, write_folder_aside

    with without_import_notices():
        from tokenization import MomaProcessor

        from ..configuration_moma import MomaConfig
        from ..data.documents import check_layout
        from ..hub.upload import UploadError, check_loads, check_repo_id, lay_out, push

    try:
        if args.output is None:
            check_repo_id(args.repo_id)
        else:
            check_new_folder(args.output)
        with TemporaryDirectory() as place:
            folder = Path(place)
            left_out = lay_out(folder, args.model, args.processor, dict(pair.split("=", 1) for pair in args.dataset))
            check_loads(folder)
            check_layout(MomaConfig.from_pretrained(place), MomaProcessor.from_pretrained(place).token_layout())
            sizes = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
            for path, size in sizes.items():
                print(f"{size:>14,}  {path.relative_to(folder)}")
            for name in left_out:
                print(f"      left out  {name}")
            target = f"{args.revision or 'main'} of {args.repo_id}" if args.output is None else args.output
            print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, for {target}")
            if args.dry_run:
                return 0
            if args.output is not None:
                # links are copied as the files that they lead to
                print(write_folder_aside(args.output, lambda aside: copytree(folder, aside, dirs_exist_ok=True)))
            elif args.repo_id:
                print(push(folder, args.repo_id, args.private, args.revision, args.message))
    except InputError as error:
        print(f"moma push: refused, nothing was sent: {error}", file=sys.stderr)
        return 2
    except UploadError as error:
        print(f"moma push: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    return run(parse_arguments(arguments))
