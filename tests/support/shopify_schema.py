"""The part of Shopify's GraphQL Admin API that has to do with one-time charges, version 2026-10.

Names, types and nullability are those of shopify.dev's reference, so that a document that does not
fit them is refused here as it is there.
"""

from typing import Final

from graphql import GraphQLSchema, build_schema

_SDL: Final = """
scalar DateTime
scalar Decimal
scalar URL

enum AppPurchaseStatus { ACCEPTED ACTIVE DECLINED EXPIRED PENDING }
enum AppTransactionSortKeys { CREATED_AT ID }
enum CurrencyCode { USD EUR GBP CAD JPY }

input MoneyInput { amount: Decimal! currencyCode: CurrencyCode! }
type MoneyV2 { amount: Decimal! currencyCode: CurrencyCode! }

interface Node { id: ID! }
interface AppPurchase {
  createdAt: DateTime!
  name: String!
  price: MoneyV2!
  status: AppPurchaseStatus!
  test: Boolean!
}
type AppPurchaseOneTime implements Node & AppPurchase {
  createdAt: DateTime!
  id: ID!
  name: String!
  price: MoneyV2!
  status: AppPurchaseStatus!
  test: Boolean!
}
type PageInfo {
  endCursor: String
  hasNextPage: Boolean!
  hasPreviousPage: Boolean!
  startCursor: String
}
type AppPurchaseOneTimeConnection {
  nodes: [AppPurchaseOneTime!]!
  pageInfo: PageInfo!
}
type AppInstallation implements Node {
  id: ID!
  oneTimePurchases(
    after: String
    before: String
    first: Int
    last: Int
    reverse: Boolean = false
    sortKey: AppTransactionSortKeys = CREATED_AT
  ): AppPurchaseOneTimeConnection!
}
type UserError { field: [String!] message: String! }
type AppPurchaseOneTimeCreatePayload {
  appPurchaseOneTime: AppPurchaseOneTime
  confirmationUrl: URL
  userErrors: [UserError!]!
}
type Query {
  currentAppInstallation: AppInstallation!
  node(id: ID!): Node
}
type Mutation {
  appPurchaseOneTimeCreate(
    name: String!
    price: MoneyInput!
    returnUrl: URL!
    test: Boolean = false
  ): AppPurchaseOneTimeCreatePayload
}
"""


def admin_api() -> GraphQLSchema:
    """The schema."""
    return build_schema(_SDL)
