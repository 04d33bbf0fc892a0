"""Remarks on input that is read all the same: one line each, in the form of errors, which commands print as warnings."""

from absl import logging

from radgs_jax import errors


def remark(source: object, field: str, found: object, done: str) -> None:
    """Logs one line `source: field: found ..., done: ...` as a warning.

    Args:
      source: the file.
      field: the place in it.
      found: the value that was found.
      done: what is done about it.
    """
    try:
        errors.fail(source, field, found, "nothing")
    except errors.InputError as error:
        # The one format of errors, with everything that a terminal cannot show already taken out.
        line = str(error).removesuffix(", wanted nothing")
    logging.warning("%s, done: %s", line, done)
