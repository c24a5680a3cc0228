-- Opens all of one customer and checks every value. pgbench runs this as shop_app.
\set id random(1, 200000)
SELECT check_customer(id, rev,
    decrypt_col(name_c,                     rekey.context('customer.name', id::text)),
    decrypt_col(email_c,                    rekey.context('customer.email', id::text)),
    decrypt_col(national_id_c,              rekey.context('customer.national_id', id::text)),
    decrypt_col_as(notes_c, NULL::jsonb,    rekey.context('customer.notes', id::text)),
    decrypt_col_as(salary_c, NULL::numeric, rekey.context('customer.salary', id::text)))
FROM customers WHERE id = :id;
