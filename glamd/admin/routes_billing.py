"""Admin routes about billing: what a merchant has had, and ending at once what is over."""

from glamd.admin.query import merchant_in_path
from glamd.billing.jobs import BillingJobs
from glamd.billing.model import Purchase
from glamd.billing.service import Billing
from glamd.http.billing_models import purchase_as_json, trial_as_json
from glamd.http.call import Answer, Call
from glamd.http.routes import OPERATOR, Route


class BillingAdminRoutes:
    """Handlers of the routes about billing."""

    def __init__(self, billing: Billing, *, jobs: BillingJobs) -> None:
        self._billing = billing
        self._jobs = jobs

    def routes(self) -> tuple[Route, ...]:
        """The table's entries."""
        found = (
            ("POST", "/v1/billing/expire-now", self._expire_now),
            ("GET", "/v1/billing/{merchant_id}", self._show),
        )
        return tuple(
            Route(method=method, path=path, handler=handler, access=(OPERATOR,))
            for method, path, handler in found
        )

    async def _show(self, call: Call) -> Answer:
        merchant_id = merchant_in_path(call)
        found = await self._billing.overview(merchant_id)
        data = {
            "merchant_id": merchant_id,
            "trial": trial_as_json(found.trial),
            "credits_purchased": found.credits_purchased,
            "last_purchase_at": found.last_purchase_at,
            "recent_purchases": [_as_json(each) for each in found.recent_purchases],
        }
        return Answer(data=data)

    async def _expire_now(self, _call: Call) -> Answer:
        ended = await self._jobs.expire_now()
        return Answer(data={"trials": ended.trials, "purchases": ended.purchases})


def _as_json(purchase: Purchase) -> dict[str, object]:
    """A purchase as its merchant sees it, and what only an operator is told."""
    return {
        **purchase_as_json(purchase),
        "pack": purchase.pack,
        "currency": purchase.price.currency,
        "is_test": purchase.is_test,
        "failure": purchase.failure,
    }
