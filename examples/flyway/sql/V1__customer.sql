-- A table as it was before anything was sealed.
CREATE TABLE customer (
    id   uuid PRIMARY KEY,
    name text NOT NULL
);
