"""What must be the same on a board: the thread client's tests and the fault table, on a real MicroPython.

Only make_app is another one here; the tests are those of test_client and test_faults.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app import App
from tests.board import BoardClient, der
from tests.test_client import (  # noqa: F401  # pytest collects them here once more
    test_a_condition_that_does_not_hold_is_a_412,
    test_a_fight_for_one_identity_is_told_once,
    test_a_module_has_a_twin_of_its_own,
    test_a_report_that_changes_nothing_is_answered_without_traffic,
    test_a_report_waits_for_the_answer_and_gives_the_version,
    test_a_setting_declared_late_is_looked_at_at_once,
    test_a_setting_goes_through_pending_to_success_and_failure,
    test_a_setting_that_is_applied_is_not_applied_again,
    test_an_answer_split_into_single_bytes_is_still_one_answer,
    test_an_invalid_patch_names_its_path_and_changes_nothing,
    test_close_waits_for_the_reports_on_their_way,
    test_desired_patches_arrive_whole_and_in_order,
    test_every_call_on_a_closed_or_unconnected_client_says_so,
    test_fifty_reports_while_one_is_in_flight_are_one_more_patch,
    test_reports_made_before_the_first_connection_are_sent_after_it,
    test_reports_made_offline_leave_as_one_patch,
    test_retrieve_asks_the_hub_now,
    test_the_first_document_is_one_patch_of_everything,
    test_the_first_twin_takes_six_packets_in_the_only_right_order,
    test_the_statistics_are_a_snapshot,
    test_the_token_is_replaced_before_it_expires,
    test_what_changed_while_offline_is_one_exact_difference,
    test_what_is_gathered_outlives_a_disconnect,
)
from tests.test_faults import (  # noqa: F401  # as above
    test_a_connected_app,
    test_a_failover_to_an_older_snapshot_is_made_up_for,
    test_a_hub_that_went_away_for_a_while,
    test_a_refused_report_is_told_and_holds_nothing_up,
    test_a_refused_report_that_nobody_waits_for_goes_to_the_error_handler,
    test_a_twin_deleted_and_created_again_starts_over,
    test_a_used_up_quota_is_waited_out_slowly,
    test_an_app_that_connects,
    test_an_app_that_is_refused_is_told_at_once,
    test_notifications_made_up_by_a_broken_hub,
    test_the_bodys_version_counts_and_the_topics_stands_in,
)
from tests.vm import build, stage
from tests.waiting import PATIENCE
from twin_device.hub import Device, LocalHub


@pytest.fixture(scope="module", params=[stage, build], ids=["sources", "built"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as they are, and what `make mpy` makes of them."""
    made: Path = request.param(tmp_path_factory.mktemp("board"))
    return made


@pytest.fixture
def make_app(local_hub: LocalHub, package: Path, tmp_path: Path) -> Iterator[Callable[..., App]]:
    ca_file = der(local_hub.ca_file, tmp_path)
    clients: list[BoardClient] = []

    def make(device: Device, **options: Any) -> App:
        options = {"ca_file": ca_file, "timeout": PATIENCE, "keep_reported": True, **options}
        client: Any = BoardClient(device.connection_string, package, **options)
        clients.append(client)
        return App(client)

    yield make
    for client in clients:
        assert client.end() == 0
        assert client.other == []
