# SPDX-License-Identifier: Apache-2.0
"""Names and tags of a folder of images, and search in it by words: `moma label` and `moma search`."""

# names or tags of an image that may be asked for: memory and time grow with them
MOST_GUESSES = 100
# codings of an image that may be asked for
MOST_VIEWS = 9
# what names of files count for in a search
FILE_NAME_SHARE = 0.5
