"""What must be the same on both shells: the thread client's tests and the fault table, on the asyncio client.

Only make_app is another one here; the tests are those of test_client and test_faults.
"""

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from pytest_mock import MockerFixture

from tests.aio_app import BlockingClient, LoopThread
from tests.app import App
from tests.test_client import (  # noqa: F401  # pytest collects them here once more
    test_7_a_call_that_was_cut_short_is_made_again,
    test_7_a_conditional_report_whose_answer_was_cut_off_is_no_error,
    test_7_a_damaged_store_is_told_and_the_client_starts_without,
    test_7_a_disk_that_is_full_is_told_once_and_written_later,
    test_7_a_handler_that_raises_has_been_given_the_patch,
    test_7_a_report_cut_off_on_its_way_is_brought_to_an_end,
    test_7_a_restart_that_changes_nothing_writes_nothing,
    test_7_a_store_has_one_client_until_it_is_closed,
    test_7_a_store_that_cannot_be_is_refused_before_any_connection,
    test_7_a_twin_that_was_created_again_starts_its_versions_over,
    test_7_a_with_that_fails_gives_the_file_back,
    test_7_after_a_restart_the_handler_gets_exactly_the_difference,
    test_7_an_answered_report_that_went_alone_does_not_come_again,
    test_7_kill_9_during_many_reports_loses_none_that_was_accepted,
    test_7_no_secret_is_kept,
    test_7_the_end_of_a_report_of_an_earlier_run_is_noticed,
    test_7_the_store_is_brought_in_only_where_it_is_asked_for,
    test_7_what_the_hub_refused_does_not_come_again,
    test_7_what_was_accepted_offline_is_delivered_by_the_next_run,
    test_a_condition_that_does_not_hold_is_a_412,
    test_a_fight_for_one_identity_is_told_once,
    test_a_module_has_a_twin_of_its_own,
    test_a_patch_that_the_app_changes_afterwards_is_sent_as_it_was,
    test_a_report_that_changes_nothing_is_answered_without_traffic,
    test_a_report_waits_for_the_answer_and_gives_the_version,
    test_a_setting_declared_late_is_looked_at_at_once,
    test_a_setting_goes_through_pending_to_success_and_failure,
    test_a_setting_that_is_applied_is_not_applied_again,
    test_an_answer_split_into_single_bytes_is_still_one_answer,
    test_an_error_handler_may_raise_too,
    test_an_invalid_patch_names_its_path_and_changes_nothing,
    test_close_waits_for_the_reports_on_their_way,
    test_desired_patches_arrive_whole_and_in_order,
    test_every_call_on_a_closed_or_unconnected_client_says_so,
    test_fifty_reports_while_one_is_in_flight_are_one_more_patch,
    test_handlers_may_raise_and_everything_goes_on,
    test_reports_made_before_the_first_connection_are_sent_after_it,
    test_reports_made_offline_leave_as_one_patch,
    test_retrieve_asks_the_hub_now,
    test_the_first_document_is_one_patch_of_everything,
    test_the_first_twin_takes_six_packets_in_the_only_right_order,
    test_the_statistics_are_a_snapshot,
    test_the_token_is_replaced_before_it_expires,
    test_what_a_handler_does_to_its_documents_is_its_own_affair,
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
    test_an_app_that_connects,
    test_an_app_that_is_refused_is_told_at_once,
    test_notifications_made_up_by_a_broken_hub,
    test_the_bodys_version_counts_and_the_topics_stands_in,
)
from tests.waiting import PATIENCE
from twin_device import aio
from twin_device.aio import TwinClient
from twin_device.hub import Device, LocalHub


@pytest.fixture
def make_app(local_hub: LocalHub, mocker: MockerFixture) -> Iterator[Callable[..., App]]:
    # Chance spreads retries in time; here it keeps them short.
    mocker.patch.object(aio, "random", SimpleNamespace(random=lambda: 0.02, randrange=random.randrange))
    loop = LoopThread()
    clients: list[Any] = []

    def make(device: Device, **options: Any) -> App:
        options = {"ca_file": local_hub.ca_file, "timeout": PATIENCE, **options}
        client = TwinClient.from_connection_string(device.connection_string, **options)
        clients.append(BlockingClient(loop, client))
        return App(clients[-1])

    yield make
    for client in clients:
        client.close()
    assert loop.close() == set()
