from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Rate",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True,
                        primary_key=True,
                        serialize=False,
                        verbose_name="ID",
                    ),
                ),
                ("currency", models.CharField(max_length=3)),
                ("per_euro", models.DecimalField(decimal_places=4, max_digits=12)),
                ("fetched_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "get_latest_by": "fetched_at",
            },
        ),
    ]
