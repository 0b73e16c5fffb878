"""The tree of errors: who is to blame, and what an app can read from each."""

import pytest

from twin_device.core import errors

# class, its only base
TREE = [
    (errors.TwinError, Exception),
    (errors.LocalError, errors.TwinError),
    (errors.PatchError, errors.LocalError),
    (errors.NotConnected, errors.LocalError),
    (errors.RemoteError, errors.TwinError),
    (errors.ReportTimeout, errors.TwinError),
    (errors.RetrieveTimeout, errors.TwinError),
    (errors.ConnectRefused, errors.TwinError),
]


@pytest.mark.parametrize(("error", "base"), TREE, ids=[error.__name__ for error, _ in TREE])
def test_an_error_has_one_base(error, base):
    assert error.__bases__ == (base,)


@pytest.mark.parametrize("error", [errors.ReportRejected, errors.RetrieveRejected])
def test_a_rejection_is_neither_the_apps_nor_a_protocol_error(error):
    assert issubclass(error, errors.TwinError)
    assert not issubclass(error, (errors.LocalError, errors.RemoteError))


def test_the_docstring_draws_every_public_error():
    public = [name for name, value in vars(errors).items() if isinstance(value, type) and name[0] != "_"]
    assert [name for name in public if name not in errors.__doc__] == []


# arguments of PatchError, its text
PATCH_ERRORS = [
    (("a.b", "a key is too long", 2000), "a.b: a key is too long, not 2000"),
    (("a[2]", "no"), "a[2]: no"),
    (("", "a patch is a JSON object (dict)", "list"), "the patch: a patch is a JSON object (dict), not list"),
    (("a", "a number", 0), "a: a number, not 0"),
]


@pytest.mark.parametrize(("arguments", "text"), PATCH_ERRORS, ids=[text for _, text in PATCH_ERRORS])
def test_a_patch_error_names_path_limit_and_size(arguments, text):
    error = errors.PatchError(*arguments)
    assert str(error) == text
    assert (error.path, error.limit, error.size) == (*arguments, None)[:3]


# error, its text
REJECTIONS = [
    (errors.ReportRejected(400), "the hub refused the report with status 400"),
    (
        errors.ReportRejected(400, 400004, "0345-G:10", "no such key"),
        "the hub refused the report with status 400, errorCode 400004: no such key (trackingId 0345-G:10)",
    ),
    (
        errors.ReportRejected(403, 403100, "", ""),
        "the hub refused the report with status 403, errorCode 403100",
    ),
    (
        errors.RetrieveRejected(404, 404001, "t"),
        "the hub refused the retrieve with status 404, errorCode 404001 (trackingId t)",
    ),
]


@pytest.mark.parametrize(("error", "text"), REJECTIONS, ids=[text for _, text in REJECTIONS])
def test_a_rejection_says_what_the_hub_said(error, text):
    assert str(error) == text


def test_a_rejection_carries_the_hubs_fields_unchanged():
    error = errors.ReportRejected(403, "403100", ["odd"], {"also": "odd"})
    assert (error.status, error.error_code, error.tracking_id) == (403, "403100", ["odd"])
    assert "odd" in str(error)


def test_a_refused_connection_can_be_retried_unless_said_otherwise():
    assert errors.ConnectRefused("why").can_retry is True
    assert errors.ConnectRefused("why", False).can_retry is False
    assert str(errors.ConnectRefused("why")) == "why"
